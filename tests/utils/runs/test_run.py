"""Runs: what is written, how they end, W&B offline."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from envs import atari_scores
from tests.commands import ROOT
from tests.event_files import scalars
from tests.wandb_files import exit_codes, history, records
from utils.dreams import traces
from utils.occasionally import MEASURED
from utils.runs.flags import RunArgs, UsageError
from utils.runs.folder import copied_from, describe_run
from utils.runs.logs import final_return
from utils.runs.run import Run
from utils.runs.signals import Interrupted, Signals
from utils.runs.wandb_run import WandbRun


class Params(NamedTuple):
    network: jax.Array


class State(NamedTuple):
    """What a run asks of a script's state."""

    params: Params
    opt_state: Any
    env_state: Any
    obs: jax.Array
    key: jax.Array


STATE = State(Params(jnp.ones(3)), {"mean": jnp.zeros(3)}, jnp.zeros(2), jnp.zeros(2), jax.random.key(1))
unsaved = partial(RunArgs, keep_checkpoints=0, save_model=False)


def fake_wandb(run, log=lambda *_, **__: None, finish=lambda _: None):
    """A W&B run that does what it is given."""
    fake = object.__new__(WandbRun)
    vars(fake).update(wandb=None, run=MagicMock(log=log, finish=finish), folder=Path("w"))
    vars(fake).update(say=print, failed=False, offline=False, logged_to=0, known=None)
    run.wandb = run.logger.wandb = fake


TRACES = ("alive", "reward", "dreamed_reward", "end", "dreamed_end", "error", "no_change")


def metrics(value, episodes=0.0):
    return {
        "losses/policy_loss": jnp.asarray(value),
        "charts/learning_rate": jnp.asarray(1e-3),
        "charts/episodes": jnp.asarray(episodes),
        "charts/episodic_return": jnp.asarray(value),
        "charts/episodic_length": jnp.asarray(value),
    }


def test_scalars_are_written_once_each_at_their_step(tmp_path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        with Run(unsaved(logdir=str(tmp_path), total_timesteps=30), "test", 10) as run:
            for k in range(3):
                zeta, measured = jnp.asarray([jnp.inf, jnp.nan, 2.0][k]), jnp.asarray(float(k != 1))
                bound = {"spi/bound/zeta": zeta, "spi/bound/" + MEASURED: measured}
                run.log(STATE, metrics(float(k), episodes=float(k == 1)) | bound)
    written = scalars(run.folder)
    assert written["spi/bound/zeta"] == [(30, 2.0)] and "not finite" not in out.getvalue()
    assert not any(MEASURED in name for name in written)
    assert written["losses/policy_loss"] == [(10, 0.0), (20, 1.0), (30, 2.0)]
    assert written["charts/episodic_return"] == [(20, 1.0)]
    breakout = atari_scores.reference("Breakout-v5")
    assert written["charts/human_normalized_score"][0][1] == pytest.approx(breakout.human_normalized(1.0))
    assert len(written["charts/SPS"]) == 2
    assert "30/30 steps" in out.getvalue() and "\r" not in out.getvalue()
    assert f"logs: {run.folder}" in out.getvalue() and "tensorboard --logdir" in out.getvalue()


def test_prefill_is_no_update_and_only_traces_that_were_taken_are_drawn(tmp_path, capsys):
    """Two rollouts that only fill a buffer, then three updates, of which the second takes no trace."""

    @dataclass
    class OfDreams(RunArgs):
        use_replay_buffer: bool = True

    args = OfDreams(keep_checkpoints=0, save_model=False, logdir=str(tmp_path), total_timesteps=50)
    with Run(args, "test", 10) as run:
        for k in range(5):
            assert run.logger.learned == (k > 2)
            of = metrics(1.0)
            if k < 2:
                del of["charts/learning_rate"], of["losses/policy_loss"]
            else:
                value = jnp.full((3, 2), float("nan") if k == 3 else 1.0)
                one = {"example": jnp.asarray(1), "taken": jnp.zeros(3), "frames": jnp.zeros((4, 2)), "like": jnp.ones((4, 2))}
                of |= {traces.PREFIX + name: x for name, x in (dict.fromkeys(TRACES, value) | one).items()}
                of[traces.PREFIX + MEASURED] = jnp.asarray(float(k != 3))
            run.log(STATE, of)
    written = scalars(run.folder)
    assert [step for step, _ in written["losses/policy_loss"]] == [30, 40, 50]
    assert [step for step, _ in written["charts/SPS"]] == [40, 50]
    out = capsys.readouterr().out
    assert out.index("compiling") < out.index("first update after") and "not finite" not in out
    events = EventAccumulator(str(run.folder), size_guidance={"images": 0})
    events.Reload()
    assert {tag: [p.step for p in events.Images(tag)] for tag in events.Tags()["images"]} == {"dreams/dream": [30, 50]}
    assert not any(name.startswith(traces.PREFIX) for name in written)


def test_interrupted_run_keeps_its_last_metrics_and_each_nan_is_said_once(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        with Run(unsaved(logdir=str(tmp_path), total_timesteps=100, stop_if_not_finite=False), "test", 10) as run:
            for k in range(3):
                later = {"losses/later": jnp.asarray(float("inf") if k else 1.0)}
                run.log(STATE, metrics(float("nan")) | later)
            raise KeyboardInterrupt
    assert len(scalars(run.folder)["losses/policy_loss"]) == 3
    out, err = capsys.readouterr()
    assert out.count("not finite") == 2 and out.count("losses/policy_loss") == 1 and out.count("losses/later") == 1
    assert "stopped after 30 steps" in out and err == ""


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_a_metric_that_cannot_be_logged_is_named(shape, tmp_path):
    with pytest.raises(ValueError, match=rf"metric spi/mine has shape \[{', '.join(map(str, shape))}\]; it must be a scalar"):
        with Run(unsaved(logdir=str(tmp_path), total_timesteps=100), "test", 10) as run:
            run.log(STATE, metrics(1.0) | {"spi/mine": jnp.zeros(shape)})
            run.log(STATE, metrics(1.0))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_acted_on_between_updates(signum, tmp_path, capsys):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as raised:
        with Run(unsaved(logdir=str(tmp_path), total_timesteps=100), "test", 10) as run:
            for _ in range(2):
                run.log(STATE, metrics(1.0))
            os.kill(os.getpid(), signum)  # anywhere in an update
            wait_for(lambda: run.signals.received)
            run.log(STATE, metrics(1.0))
            raise AssertionError("not reached")
    assert raised.value.signum == signum and signal.getsignal(signum) is before
    assert len(scalars(run.folder)["losses/policy_loss"]) == 3
    assert "stopping after this update" in capsys.readouterr().out


@pytest.mark.parametrize(
    "signum, seconds, leaves",
    [(signal.SIGTERM, 600.0, []), (signal.SIGTERM, -1.0, [143]), (signal.SIGINT, 600.0, [130]), (signal.SIGHUP, 600.0, [])],
)
def test_an_echo_is_no_second_signal(signum, seconds, leaves, monkeypatch):
    """`uv run` sends on the SIGTERM that the script has had already; nobody echoes Ctrl-C."""
    left, noted, signals = [], [], Signals()
    monkeypatch.setattr("utils.runs.signals.ECHO_SECONDS", seconds)
    monkeypatch.setattr("utils.runs.signals.os._exit", left.append)
    signals.watch(noted.append)
    for _ in range(2):
        os.kill(os.getpid(), signum)
        wait_for(lambda: noted)
    wait_for(lambda: left == leaves)
    signals.restore()
    assert left == leaves and noted == [signum] == [signals.received]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Deferred:
    """A metric whose computation turns out to have failed only when it is fetched, as it is with asynchronous dispatch."""

    def __array__(self, *_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: the last update failed")


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["the last update", "the final flush"])
def test_what_fails_last_is_a_failure(where, tmp_path, capsys):
    told = []
    with pytest.raises((jax.errors.JaxRuntimeError, OSError)):
        with Run(unsaved(logdir=str(tmp_path), total_timesteps=20), "test", 10) as run:
            fake_wandb(run, finish=told.append)
            run.log(STATE, metrics(1.0))
            run.log(STATE, metrics(1.0) | ({"losses/late": Deferred()} if where == "the last update" else {}))
            if where == "the final flush":
                run.logger.events.records.flush = fail
    out = capsys.readouterr().out
    assert "stopped after" in out and "ended" not in out and out.count("logs:") == 1
    assert told == [1]


def test_a_run_that_ends_says_so_once(tmp_path, capsys):
    told = []
    with Run(unsaved(logdir=str(tmp_path), total_timesteps=10), "test", 10) as run:
        fake_wandb(run, finish=told.append)
        run.log(STATE, metrics(1.0))
    assert told == [0] and capsys.readouterr().out.count("ended after 10 steps") == 1


def test_the_home_folder_and_a_folder_to_quote(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with Run(unsaved(logdir="~/my runs", total_timesteps=10), "test", 10) as run:
        run.log(STATE, metrics(1.0))
    assert run.folder.parent == tmp_path / "my runs" and not (tmp_path / "~").exists()
    closing = capsys.readouterr().out.split("(uv run ")[1].strip().removesuffix(")")
    assert shlex.split(closing) == ["tensorboard", "--logdir", str(tmp_path / "my runs")]


LOG = """
import sys
import jax.numpy as jnp
from tests.utils.runs.test_run import STATE, unsaved
from utils.runs.run import Run
value = jnp.asarray(1.0)
names = ["losses/policy_loss", "charts/learning_rate", "charts/episodic_return", "charts/episodic_length", "charts/episodes"]
with Run(unsaved(track=True, total_timesteps=20, seed=5, logdir=sys.argv[1], **eval(sys.argv[2])), "test", 10) as run:
    for _ in range(2):
        run.log(STATE, dict.fromkeys(names, value) | {"charts/picture": jnp.zeros((4, 4), jnp.uint8)})
"""


def log_in_a_process(code, folder, *arguments, returns=0, **variables):
    """Runs the code in a process of its own, started in the folder, with W&B offline."""
    variables = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true"} | variables
    variables |= {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    typed = [sys.executable, "-c", code, ".", *arguments]
    done = subprocess.run(typed, capture_output=True, text=True, cwd=folder, env=variables, timeout=120)
    assert (done.returncode, done.stderr) == (returns, ""), done.stderr
    return done.stdout


def tracked(folder, flags, **variables):
    """The W&B run of a few updates, and its history."""
    log_in_a_process(LOG, folder, repr(flags), **variables)
    (run,) = [record.run for record in records(folder) if record.HasField("run")][:1]
    return run, history(folder)


GO_ON = """
import sys
from tests.states import make_state
from tests.utils.runs.test_resume import SAVEABLE
from tests.utils.runs.test_run import metrics
from utils.runs.flags import RunArgs
from utils.runs.run import Run
_, logdir, name, last, flags = sys.argv
args = RunArgs(track=True, total_timesteps=60, run_name=name, resume="auto", logdir=logdir, **eval(flags))
with Run(args, "test", 10) as run:
    run.restore(make_state(), SAVEABLE)
    for k in range(run.iteration, 6):
        run.next_save = 0 if k == 1 else float("inf")
        run.log(make_state(), metrics(float(k), episodes=2.0))
        if k == int(last):
            sys.exit(9)
"""


def go_on(folder, name="a", last=-1, **flags):
    """One session of a run of 60 steps, which saves at step 20. It fails after its update `last`."""
    return log_in_a_process(GO_ON, folder, name, str(last), repr(flags), returns=9 if last >= 0 else 0)


def wandb_folders(folder):
    return sorted(folder.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)


def steps_in(folder):
    return [row["global_step"] for row in history(folder)]


def test_wandb_goes_on_under_the_same_id_and_its_steps_never_go_back(tmp_path):
    """A process fails long after its checkpoint of step 20, and another one ends the run."""
    for last in (4, -1):
        out = go_on(tmp_path, last=last)
    folders = wandb_folders(tmp_path)
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    steps = [step for folder in folders for step in steps_in(folder)]
    assert steps == [10, 20, 30, 40, 50, 60]
    assert len(folders) == 2 and f"wandb sync {folders[-1]}" in out.replace(f"{tmp_path}/./", f"{tmp_path}/")
    assert [exit_codes(folder) for folder in folders] == [[1], [0]]
    read = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in read] == steps
    assert [step for step, _ in scalars(tmp_path / "a")["losses/policy_loss"]] == steps


EVALUATE = """
import json, sys
from pathlib import Path
from utils.runs.wandb_run import add_to_summary
identity = json.loads(Path(sys.argv[1], "a", "run.json").read_text())["wandb"]
add_to_summary(identity, {"evaluation/return_mean": 2.5})
"""


def test_wandb_of_a_copied_a_damaged_and_an_evaluated_run(tmp_path):
    """A copy gets a W&B run of its own, with all rows. What W&B's file of the first run loses is sent again."""
    go_on(tmp_path, last=4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    out = go_on(tmp_path, "b", upload_model=True)
    assert f"copied from {tmp_path / 'a'}" in out.replace("/./", "/")
    ours, theirs = wandb_folders(tmp_path)
    name_of = lambda folder: folder.name.rpartition("-")[2]  # noqa: E731
    assert name_of(ours) != name_of(theirs) and steps_in(theirs) == [10, 20, 30, 40, 50, 60]

    written = records(theirs)
    config = {item.key or item.nested_key[0]: json.loads(item.value_json) for r in written for item in r.config.update}
    config |= {item.key: json.loads(item.value_json) for r in written for item in r.run.config.update}
    sizes = {"exp_name": "flags", "batch_size": 10, "num_iterations": 6, "num_actions": 2, "obs_shape": [3]}
    assert sizes.items() <= config.items() and config["num_parameters"] > 0 and "gridworld_epsilon" not in config
    (group,) = [record.run.run_group for record in written if record.HasField("run")][:1]
    assert group == "Breakout-v5__test__total-timesteps-60"
    summary = {item.key or item.nested_key[0]: json.loads(item.value_json) for r in written for item in r.summary.update}
    assert summary["final_return"] == 5.0
    artifacts = {r.request.log_artifact.artifact.type or r.artifact.type for r in written if "artifact" in str(r)[:3000]}
    assert {"code", "model"} <= artifacts

    (file,) = ours.glob("run-*.wandb")
    whole = file.stat().st_size
    while steps_in(ours) and steps_in(ours)[-1] > 10:
        whole -= 50
        os.truncate(file, whole)
    assert steps_in(ours) == [10]
    assert "W&B lacked the last 1 updates before this step" in go_on(tmp_path)
    resumed = wandb_folders(tmp_path)[-1]
    assert name_of(resumed) == name_of(ours) and steps_in(resumed) == [20, 30, 40, 50, 60]

    log_in_a_process(EVALUATE, tmp_path)
    evaluated = wandb_folders(tmp_path)[-1]
    assert name_of(evaluated) == name_of(ours)
    items = [item for record in records(evaluated) for item in record.summary.update]
    (value,) = [item.value_json for item in items if "evaluation/return_mean" in (item.key, *item.nested_key)]
    assert json.loads(value) == 2.5


def test_a_run_that_was_moved_stays_the_same_wandb_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    record = {"id": "i", "project": "p", "entity": None, "logged_to": 0, "folder": str(tmp_path / "a")}
    (tmp_path / "a" / "run.json").write_text(json.dumps(describe_run(RunArgs(), "a", "a") | {"sittings": [], "wandb": record}))
    assert copied_from(record, tmp_path / "b") == tmp_path / "a"
    assert copied_from(record, tmp_path / "a") is None
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert copied_from(record, tmp_path / "link") is None
    (tmp_path / "a").rename(tmp_path / "c")
    assert copied_from(record, tmp_path / "c") is None


def test_the_final_score_is_the_reports(tmp_path):
    from experiments.study.records import final_score, read_folder

    rng, planned = np.random.default_rng(0), 3_000
    for gap in (0, 500):  # no episode ends in the last steps
        steps = np.arange(7, planned + 1, 7)
        counts = rng.integers(0, 3, len(steps)) * (steps <= planned - gap)
        rows = [{"step": int(s), "charts/episodes": int(n)} for s, n in zip(steps, counts, strict=True)]
        rows = [row | ({"charts/episodic_return": rng.normal()} if row["charts/episodes"] else {}) for row in rows]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = {"env_id": "Pong-v5", "seed": 1, "num_envs": 1, "num_steps": 1, "total_timesteps": planned}
        record = {"name": "a", "algorithm": "a", "script": "none", "seed": 1, "flags": flags, "sittings": []}
        (tmp_path / "run.json").write_text(json.dumps(record))
        run, _ = read_folder(tmp_path, "charts/episodic_return")
        assert final_return(tmp_path, planned) == pytest.approx(final_score(run, 40, 2))


def test_wandb_defaults_and_history(tmp_path):
    """Started in the log folder itself, so that W&B's folder lies in it: TensorBoard still finds one event file."""
    run, logged = tracked(tmp_path, {})
    assert run.project == "deep-spi" and run.display_name.startswith("Breakout-v5__test__5__")
    assert run.run_group == "Breakout-v5__test__total-timesteps-20"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["algorithm"], config["script"], config["seed"]) == ("test", "flags", 5)
    assert config["device"].startswith("cpu") and "jax" in config["versions"] and "git_commit" in config
    assert [(float(row["global_step"]), float(row["losses/policy_loss"])) for row in logged] == [(10, 1), (20, 1)]
    assert len(list(tmp_path.glob("**/*tfevents*"))) == 1
    assert exit_codes(tmp_path) == [0]


@pytest.mark.parametrize("typed", [pytest.param(False, marks=pytest.mark.slow), True])
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
        with Run(unsaved(track=True, logdir=str(tmp_path / "runs")), "test", 10):
            raise AssertionError("not reached")
    assert not any((tmp_path / "runs").iterdir()) and signal.getsignal(signal.SIGINT) is before


def fake_wandb_init(monkeypatch, refused=()):
    """W&B, which starts in any mode but those refused. What it was given last, and the steps logged."""
    import wandb

    given, steps = {}, []

    def init(mode=None, **others):
        given.update(others, modes=[*given.get("modes", []), mode])
        if mode in refused:
            raise TimeoutError("no answer")
        settings = SimpleNamespace(sync_dir="w", sync_file="w/run.wandb", mode=mode or "online", save_code=False)
        log = lambda _, step: steps.append(step)  # noqa: E731
        return MagicMock(id="i", project="p", entity="", settings=settings, log=log, resumed=False)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda _: None)
    return given, steps


@pytest.mark.parametrize("offline_too", [False, True])
def test_wandb_that_cannot_be_reached_ends_no_run(offline_too, tmp_path, monkeypatch, capsys):
    """Its service does not start; then not even offline."""
    given, _ = fake_wandb_init(monkeypatch, refused=(None, "offline") if offline_too else (None,))
    with Run(unsaved(logdir=str(tmp_path), total_timesteps=10, track=True), "test", 10) as started:
        started.log(STATE, metrics(1.0))
    out = capsys.readouterr().out
    assert (
        given["modes"] == [None, "offline"]
        and "ended after 10 steps" in out
        and out.count("cannot be reached (no answer)") == 1
    )
    assert ("continues without it" in out) == offline_too and ("wandb sync w" in out) != offline_too


@pytest.mark.parametrize("when", ["in the run", "at its end"])
def test_wandb_that_dies_is_said_once_and_training_goes_on(when, tmp_path, capsys):
    def gone(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    with Run(unsaved(logdir=str(tmp_path), total_timesteps=30), "test", 10) as run:
        fake_wandb(run, finish=gone, **({"log": gone} if when == "in the run" else {}))
        for _ in range(3):
            run.log(STATE, metrics(1.0))
    assert len(scalars(run.folder)["losses/policy_loss"]) == 3
    out = capsys.readouterr().out
    assert out.count("Broken pipe") == 1 and out.count("wandb sync w") == 1 and "ended after 30 steps" in out


def test_a_name_without_an_encoding(tmp_path):
    """A folder from another system, and a tag typed in a terminal with another encoding."""
    with Run(unsaved(logdir=str(tmp_path / "l\udcff"), total_timesteps=10), "test", 10) as run:
        run.log(STATE, metrics(1.0))
    assert len(list(tmp_path.glob("*/*/*tfevents*"))) == 1


def test_a_folder_that_cannot_be_made_leaves_signals_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        with Run(unsaved(logdir=str(tmp_path / "file" / "runs")), "test", 10):
            raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("entered", [False, True])
def test_runs_of_the_same_flags_in_the_same_second_keep_apart(entered, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.runs.folder.time.time", lambda: 1_700_000_000.0)
    args = unsaved(logdir=str(tmp_path), total_timesteps=10)
    runs = [Run(args, "test", 10)]
    if not entered:
        runs.append(Run(args, "test", 10))
    with runs[0]:
        runs[0].log(STATE, metrics(1.0))
    if entered:
        runs.append(Run(args, "test", 10))
    with runs[1]:
        runs[1].log(STATE, metrics(1.0))
    assert runs[0].folder != runs[1].folder
    assert [len(scalars(run.folder)["losses/policy_loss"]) for run in runs] == [1, 1]


def test_an_update_that_fails_loses_nothing_of_the_one_before(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError):
        with Run(unsaved(logdir=str(tmp_path), total_timesteps=100), "test", 10) as run:
            for _ in range(3):
                run.log(STATE, metrics(1.0))
            raise jax.errors.JaxRuntimeError("INTERNAL: the fourth failed as it was dispatched")
    assert [step for step, _ in scalars(run.folder)["losses/policy_loss"]] == [10, 20, 30]
