"""Logging: what is written, how runs end, W&B offline."""

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import ROOT
from tests.event_files import scalars
from tests.wandb_files import exit_codes, records
from utils.dreams import traces
from utils.occasionally import MEASURED
from utils.runs import scores
from utils.runs.flags import RunArgs, UsageError
from utils.runs.logs import Logger

TRACES = ("alive", "reward", "dreamt_reward", "end", "dreamt_end", "error", "no_change")


def metrics(value, episodes=0.0):
    return {
        "losses/policy_loss": jnp.asarray(value),
        "charts/learning_rate": jnp.asarray(1e-3),
        "episodes": jnp.asarray(episodes),
        "charts/episodic_return": jnp.asarray(value),
        "charts/episodic_length": jnp.asarray(value),
    }


def test_scalars_are_written_once_each_at_their_step(tmp_path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        with Logger(RunArgs(logdir=str(tmp_path), total_timesteps=30), "test", 10) as logger:
            for k in range(3):
                zeta, measured = jnp.asarray([jnp.inf, jnp.nan, 2.0][k]), jnp.asarray(float(k != 1))
                bound = {"spi/bound/zeta": zeta, "spi/bound/" + MEASURED: measured}
                logger.log(metrics(float(k), episodes=float(k == 1)) | bound)
    written = scalars(logger.folder)
    assert written["spi/bound/zeta"] == [(30, 2.0)] and "not finite" not in out.getvalue()
    assert not any(MEASURED in name for name in written)
    assert written["losses/policy_loss"] == [(10, 0.0), (20, 1.0), (30, 2.0)]
    assert written["charts/episodic_return"] == [(20, 1.0)]
    breakout = scores.reference("Breakout-v5")
    assert written["charts/human_normalized_score"][0][1] == pytest.approx(breakout.human_normalized(1.0))
    assert len(written["charts/SPS"]) == 2
    assert "30/30 steps" in out.getvalue() and "\r" not in out.getvalue()
    assert f"logs: {logger.folder}" in out.getvalue() and "tensorboard --logdir" in out.getvalue()


def test_prefill_is_no_update_and_only_traces_that_were_taken_are_drawn(tmp_path, capsys):
    """Two rollouts that only fill a buffer, then three updates, of which the second takes no trace."""
    with Logger(RunArgs(logdir=str(tmp_path), total_timesteps=50), "test", 10) as logger:
        for k in range(5):
            of = metrics(1.0)
            if k < 2:
                del of["charts/learning_rate"], of["losses/policy_loss"]
            else:
                value = jnp.full((3, 2), float("nan") if k == 3 else 1.0)
                of |= {traces.PREFIX + name: value for name in TRACES}
                of[traces.PREFIX + MEASURED] = jnp.asarray(float(k != 3))
            logger.log(of)
    written = scalars(logger.folder)
    assert [step for step, _ in written["losses/policy_loss"]] == [30, 40, 50]
    assert [step for step, _ in written["charts/SPS"]] == [40, 50]
    out = capsys.readouterr().out
    assert out.index("compiling") < out.index("first update after") and "not finite" not in out
    events = EventAccumulator(str(logger.folder), size_guidance={"images": 0})
    events.Reload()
    assert {tag: [p.step for p in events.Images(tag)] for tag in events.Tags()["images"]} == {
        "dreams/outcomes": [30, 50], "dreams/latent_error": [30, 50]
    }  # fmt: skip
    assert not any(name.startswith(traces.PREFIX) for name in written)


def test_interrupted_run_keeps_its_last_metrics_and_each_nan_is_said_once(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        with Logger(RunArgs(logdir=str(tmp_path), total_timesteps=100), "test", 10) as logger:
            for k in range(3):
                later = {"losses/later": jnp.asarray(float("inf") if k else 1.0)}
                logger.log(metrics(float("nan")) | later)
            raise KeyboardInterrupt
    assert len(scalars(logger.folder)["losses/policy_loss"]) == 3
    out, err = capsys.readouterr()
    assert out.count("not finite") == 2 and out.count("losses/policy_loss") == 1 and out.count("losses/later") == 1
    assert "stopped after 30 steps" in out and err == ""


def test_a_signal_is_acted_on_between_updates(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        with Logger(RunArgs(logdir=str(tmp_path), total_timesteps=100), "test", 10) as logger:
            for _ in range(2):
                logger.log(metrics(1.0))
            for _ in range(2):  # anywhere in an update
                os.kill(os.getpid(), signal.SIGINT)
            logger.log(metrics(1.0))
            raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(scalars(logger.folder)["losses/policy_loss"]) == 3
    assert "stopping after this update" in capsys.readouterr().out


class Deferred:
    """A metric whose computation turns out to have failed only when it is fetched, as it is with asynchronous dispatch."""

    def __array__(self, *_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: the last update failed")


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["the last update", "the final flush", "closing W&B"])
def test_what_fails_last_is_a_failure(where, tmp_path, capsys):
    told = []
    with pytest.raises((jax.errors.JaxRuntimeError, OSError)):
        with Logger(RunArgs(logdir=str(tmp_path), total_timesteps=20), "test", 10) as logger:
            logger.run = SimpleNamespace(log=lambda _: None, finish=told.append)
            logger.log(metrics(1.0))
            logger.log(metrics(1.0) | ({"losses/late": Deferred()} if where == "the last update" else {}))
            if where == "the final flush":
                logger.events.records.flush = fail
            if where == "closing W&B":
                logger.run.finish = fail
    out = capsys.readouterr().out
    assert "stopped after" in out and "ended" not in out and out.count("logs:") == 1
    assert told == ([] if where == "closing W&B" else [1])


def test_a_run_that_ends_says_so_once(tmp_path, capsys):
    told = []
    with Logger(RunArgs(logdir=str(tmp_path), total_timesteps=10), "test", 10) as logger:
        logger.run = SimpleNamespace(log=lambda _: None, finish=told.append)
        logger.log(metrics(1.0))
    assert told == [0] and capsys.readouterr().out.count("ended after 10 steps") == 1


def test_the_home_folder_and_a_folder_to_quote(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with Logger(RunArgs(logdir="~/my runs", total_timesteps=10), "test", 10) as logger:
        logger.log(metrics(1.0))
    assert logger.folder.parent == tmp_path / "my runs" and not (tmp_path / "~").exists()
    closing = capsys.readouterr().out.split("(uv run ")[1].strip().removesuffix(")")
    assert shlex.split(closing) == ["tensorboard", "--logdir", str(tmp_path / "my runs")]


@pytest.fixture(autouse=True)
def heeding():
    """Ctrl-C as Python has it, whatever starts the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


LOG = """
import sys
import jax.numpy as jnp
from utils.runs.flags import RunArgs
from utils.runs.logs import Logger
value = jnp.asarray(1.0)
names = ["losses/policy_loss", "charts/learning_rate", "charts/episodic_return", "charts/episodic_length", "episodes"]
with Logger(RunArgs(track=True, total_timesteps=20, seed=5, logdir=sys.argv[1], **eval(sys.argv[2])), "test", 10) as logger:
    for _ in range(2):
        logger.log(dict.fromkeys(names, value) | {"charts/picture": jnp.zeros((4, 4), jnp.uint8)})
"""


def tracked(folder, flags, **variables):
    """The W&B run of a few updates logged in a process of its own, started in the folder, and its history."""
    variables = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true"} | variables
    variables |= {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    code = [sys.executable, "-c", LOG, ".", repr(flags)]
    done = subprocess.run(code, capture_output=True, text=True, cwd=folder, env=variables, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = records(folder)
    (run,) = [record.run for record in found if record.HasField("run")][:1]
    history = [
        {item.key or "/".join(item.nested_key): item.value_json for item in r.history.item} for r in found if r.history.item
    ]
    return run, history


def test_wandb_defaults_and_history(tmp_path):
    """Started in the log folder itself, so that W&B's folder lies in it: TensorBoard still finds one event file."""
    run, history = tracked(tmp_path, {})
    assert run.project == "deep-spi" and run.display_name.startswith("Breakout-v5__test__5__")
    assert [(float(row["global_step"]), float(row["losses/policy_loss"])) for row in history] == [(10, 1), (20, 1)]
    assert len(list(tmp_path.glob("**/*tfevents*"))) == 1
    assert exit_codes(tmp_path) == [0]


@pytest.mark.parametrize("typed", [False, True])
def test_wandb_environment_variables_yield_to_typed_flags_alone(typed, tmp_path):
    said = {"WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_TAGS": "a,b", "WANDB_RUN_GROUP": "g", "WANDB_ENTITY": "e"}
    (tmp_path / "elsewhere").mkdir()
    flags = {"wandb_project_name": "deep-spi", "wandb_tags": ("c",), "wandb_group": "h", "wandb_entity": "f"} if typed else {}
    run, _ = tracked(tmp_path, flags, WANDB_DIR=str(tmp_path / "elsewhere"), **said)
    found = (run.project, run.display_name, list(run.tags), run.run_group, run.entity)
    assert found == (("deep-spi", "n", ["c"], "h", "f") if typed else ("p", "n", ["a", "b"], "g", "e"))
    assert (tmp_path / "elsewhere" / "wandb").exists() and not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("fault", ["no account", "a wrong variable", "Ctrl-C"])
def test_wandb_that_cannot_start_leaves_nothing(fault, tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        if fault == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        raise wandb.errors.UsageError("no API key\nconfigured")

    if fault == "a wrong variable":
        monkeypatch.setenv("WANDB_MODE", "nonsense")
        expected = pytest.raises(UsageError, match=r"--track: W&B did not start \(.*mode.*\); run `wandb login`")
    else:
        monkeypatch.setattr(wandb, "init", refuse)
        expected = pytest.raises(UsageError, match=r"--track: W&B did not start \(no API key configured\); run `wandb login`")
    before = signal.getsignal(signal.SIGINT)
    with expected if fault != "Ctrl-C" else pytest.raises(KeyboardInterrupt):
        with Logger(RunArgs(track=True, logdir=str(tmp_path / "runs")), "test", 10):
            raise AssertionError("not reached")
    assert not any((tmp_path / "runs").iterdir()) and signal.getsignal(signal.SIGINT) is before


def test_wandb_that_dies_is_said_once_and_training_goes_on(tmp_path, capsys):
    def gone(*_):
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(OSError, match="W&B was not told how the run ended"):
        with Logger(RunArgs(logdir=str(tmp_path), total_timesteps=30), "test", 10) as logger:
            logger.run = SimpleNamespace(log=gone, finish=gone)
            for _ in range(3):
                logger.log(metrics(1.0))
    assert len(scalars(logger.folder)["losses/policy_loss"]) == 3
    assert capsys.readouterr().out.count("W&B takes no more") == 1


def test_a_name_without_an_encoding(tmp_path):
    """A folder from another system, and a tag typed in a terminal with another encoding."""
    with Logger(RunArgs(logdir=str(tmp_path / "l\udcff"), total_timesteps=10), "test", 10) as logger:
        logger.log(metrics(1.0))
    assert len(list(tmp_path.glob("*/*/*tfevents*"))) == 1


def test_a_folder_that_cannot_be_made_leaves_signals_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        with Logger(RunArgs(logdir=str(tmp_path / "file" / "runs")), "test", 10):
            raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is before


def test_runs_of_the_same_flags_in_the_same_second_keep_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.runs.logs.time.time", lambda: 1_700_000_000.0)
    loggers = [Logger(RunArgs(logdir=str(tmp_path), total_timesteps=10), "test", 10) for _ in range(2)]
    for logger in loggers:
        with logger:
            logger.log(metrics(1.0))
    assert loggers[0].folder != loggers[1].folder
    assert [len(scalars(logger.folder)["losses/policy_loss"]) for logger in loggers] == [1, 1]


def test_an_update_that_fails_loses_nothing_of_the_one_before(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError):
        with Logger(RunArgs(logdir=str(tmp_path), total_timesteps=100), "test", 10) as logger:
            for _ in range(3):
                logger.log(metrics(1.0))
            raise jax.errors.JaxRuntimeError("INTERNAL: the fourth failed as it was dispatched")
    assert [step for step, _ in scalars(logger.folder)["losses/policy_loss"]] == [10, 20, 30]
