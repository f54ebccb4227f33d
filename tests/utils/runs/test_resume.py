"""Runs that go on: to the bit where the environment can be saved, and honestly where it cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deep_spi
import dream_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from envs.protocol import EpisodeStats
from envs.registry import make_env
from tests.commands import command
from tests.event_files import scalars
from tests.states import make_state, same
from tests.utils.runs.test_checkpoints import contents, damage
from tests.utils.runs.test_run import fake_wandb_init, metrics, wait_for
from utils.runs.checkpoints import begin_writing, find
from utils.runs.flags import RunArgs, UsageError, parse_flags
from utils.runs.folder import read_record
from utils.runs.launch import FolderLost, NotFinite, RunIsFinished, run_script
from utils.runs.load_run import find_params, load_run
from utils.runs.logs import cut_back, last_step
from utils.runs.run import Run
from utils.runs.signals import Interrupted
from utils.runs.stored_flags import stretched, to_store

TIMES = ("elapsed", "charts/SPS", "charts/SPS_update")
SMALL = ["--num-envs=4", "--num-steps=8", "--num-minibatches=1", "--update-epochs=1", "--total-timesteps=320", "--fc-layers=8"]
SMALL += ["--latent=categorical", "--num-categories=2", "--num-classes=2"]
GRIDWORLD = ["--env-id=ConfoundingGridworld-v0", *SMALL]
REPLAYED = ["--use-replay-buffer", "--replay-capacity=400", "--replay-prefill=64", "--replay-length=4", "--replay-batch-size=4"]
REPLAYED += ["--replay-ratio=1", "--num-minibatches=8", "--update-epochs=4", "--save-replay"]


def rows(folder):
    """metrics.jsonl without what tells the time."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read]


def assert_same_runs(a, b):
    """Final parameters, all numbers in metrics.jsonl, all that TensorBoard shows."""
    assert rows(a) == rows(b)
    assert same(load_run(a)[0], load_run(b)[0])
    shown = [{name: x for name, x in scalars(folder).items() if name not in TIMES} for folder in (a, b)]
    assert shown[0] == shown[1]


def args_of(script, flags, tmp_path, **more):
    """The flags as typed, and others by name."""
    return replace(parse_flags(script.Args, [*flags, f"--logdir={tmp_path}"]), **more)


def stop_after(monkeypatch, updates):
    """Has the process get a SIGTERM in its `updates`-th update."""
    log = Run.log

    def log_and_signal(run, state, metrics):
        if run.iteration + 1 == updates:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: run.signals.received)
        log(run, state, metrics)

    monkeypatch.setattr(Run, "log", log_and_signal)


@pytest.fixture
def same_threads(monkeypatch):
    """Processes that are started have two devices, as here: XLA has a thread for each, and sums by threads."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")


def test_killed_at_any_moment_the_same_command_ends_with_the_same_numbers(tmp_path, same_threads):
    """kill -9, twice: before the second checkpoint, and later; it saves after every update. Films change nothing. And what is
    known of the gridworld exactly is logged."""
    ppo.main(args_of(ppo, GRIDWORLD, tmp_path, run_name="whole", capture_video=True, video_every=150))
    assert sorted(path.stem for path in (tmp_path / "whole" / "videos").iterdir()) == [f"{n:012d}" for n in (160, 320)]
    written = scalars(tmp_path / "whole")
    assert {"charts/init_value", "charts/representation_distance", "values/2_0", "values/3_5"} <= set(written)
    assert written["values/2_0"] == written["charts/init_value"] and len(written["values/2_0"]) == 10
    typed = command("ppo_atari_envpool_xla_jax_scan.py", *GRIDWORLD, f"--logdir={tmp_path}", "--run-name=killed")
    typed += ["--resume=auto", "--save-every=0", "--keep-checkpoints=3"]
    checkpoints = tmp_path / "killed" / "checkpoints"
    for moment in (1, 6, None):
        process = subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if moment is not None:
            wait_for(lambda: any(path.name.isdecimal() and int(path.name) >= moment * 32 for path in checkpoints.glob("*")))  # noqa: B023
            process.kill()
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), err
    assert "resumes from step" in out
    assert len(json.loads((tmp_path / "killed" / "run.json").read_text())["sittings"]) == 3
    assert len(list((tmp_path / "killed").glob("events*"))) == 3
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")
    events = EventAccumulator(str(tmp_path / "killed"), size_guidance={"images": 0})
    events.Reload()
    pictures = events.Images("charts/policy_matrix")
    assert [(p.step, p.height, p.width) for p in pictures] == [(step, 192, 64) for step in range(32, 321, 32)]


@pytest.mark.parametrize(
    "script, flags, at",
    [
        (ppo, [], 7),
        pytest.param(ppo, ["--env-id=Asterix-MinAtar"], 7, marks=pytest.mark.slow),
        pytest.param(deep_spi, [], 7, marks=pytest.mark.slow),
        pytest.param(dream_spi, REPLAYED, 7, marks=pytest.mark.slow),
        pytest.param(dream_spi, REPLAYED, 1, marks=pytest.mark.slow),  # while the buffer is filled
        pytest.param(dream_spi, ["--progressive=linear"], 7, marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_it_saves_and_goes_on_to_the_bit(script, flags, at, tmp_path, same_threads, monkeypatch, capsys):
    of = lambda **more: args_of(script, [*GRIDWORLD, *flags], tmp_path, **more)  # noqa: E731
    script.main(of(run_name="whole", keep_checkpoints=0))  # saving changes nothing either
    with monkeypatch.context() as patched, pytest.raises(Interrupted) as stopped:
        stop_after(patched, at)
        script.main(of(run_name="stopped"))
    assert stopped.value.signum == signal.SIGTERM
    folder = tmp_path / "stopped"
    assert [int(path.name) for path in (folder / "checkpoints").iterdir()] == [at * 32]
    assert len(rows(folder)) == at and not (folder / "model").exists()
    assert "\nresume from step" in capsys.readouterr().out
    script.main(of(run_name="stopped", resume="auto"))
    assert_same_runs(tmp_path / "whole", folder)
    with pytest.raises(RunIsFinished, match="already finished after 320 steps"):
        script.main(of(run_name="stopped", resume="auto"))


def test_a_run_of_emulators_goes_on_with_new_games(tmp_path, monkeypatch):
    """CartPole of envpool's: steps, rates and the log go on, and no episode counts before each environment has ended one."""
    of = lambda **more: args_of(ppo, ["--env-id=CartPole-v1", *SMALL, "--total-timesteps=960"], tmp_path, **more)  # noqa: E731
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_after(patched, 7)
        ppo.main(of(run_name="a"))
    stopped_at = find(tmp_path / "a" / "checkpoints" / "000000000224").progress["log"]["elapsed"]
    ppo.main(of(run_name="a", resume="auto"))
    found = rows(tmp_path / "a")
    assert [row["step"] for row in found] == list(range(32, 961, 32))
    np.testing.assert_allclose([row["charts/learning_rate"] for row in found], 1e-3 * (1 - np.arange(30) / 30), rtol=1e-5)
    times = [json.loads(line)["elapsed"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert np.all(np.diff(times) > 0) and stopped_at == times[6]
    last = find(tmp_path / "a" / "checkpoints" / "000000000960")
    assert [name for name in last.progress["structure"] if "env_state" in name or "obs" in name] == []
    # a mean return stands where episodes ended that count, which is not before each of the four environments has ended one:
    # the same games again say when that is
    env = make_env(of(), 7)
    state, obs = env.reset()
    assert env.midway and not state.episode.counts.any()
    with_return = [k for k, row in enumerate(found) if "charts/episodic_return" in row]
    assert min(with_return) < 7 and [k for k in with_return if k >= 7][0] > 7


def test_a_policy_that_goes_on_is_not_seen_to_get_worse():
    """CartPole's random policy: what ends in the first steps of environments that begin together is too short, and is not
    counted."""
    fresh, going_on = (mean_returns(ppo.Args(env_id="CartPole-v1", num_envs=64, num_minibatches=1), at) for at in (0, 5))
    settled = np.mean(fresh[4:])
    assert fresh[0] < 0.75 * settled  # the dip
    assert min(going_on) > 0.8 * settled


def mean_returns(args, iteration):
    """Mean return of the episodes that count in each ten steps of a random policy, where there are any."""
    env = make_env(args, iteration)
    state, _ = env.reset()

    @jax.jit
    def run(state):
        def step(state, key):
            state, after = env.step(state, jax.random.randint(key, (args.num_envs,), 0, 2))
            return state, after.episode

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 200))[1]

    episode = run(state)
    counts, returns = (np.asarray(x).reshape(20, -1) for x in (episode.to_count(), episode.episode_return))
    return [returns[k][counts[k]].mean() for k in range(20) if counts[k].any()]


def test_episodes_count_from_where_each_environment_has_ended_one():
    ends = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 1, 0], [1, 0, 1]], bool)
    for midway, expected in ((False, ends), (True, ends & (np.arange(5) > 2)[:, None])):
        stats, counted = EpisodeStats.zeros(3, midway), []
        for end in ends:
            stats = stats.update(jnp.ones(3), jnp.ones(3, bool), jnp.asarray(end))
            counted.append(stats.to_count())
        np.testing.assert_array_equal(counted, expected)


def step_once(run):
    """One update of a script that learns nothing."""
    with run:
        state = run.restore(make_state(run.iteration), SAVEABLE)
        run.log(state, metrics(1.0))
    return state


class SAVEABLE:
    saveable, num_actions, obs_spec = True, 2, jnp.zeros(3)


@pytest.fixture
def stopped(tmp_path):
    """Flags of a run of 10 updates that has stopped after 3, with checkpoints of the last two."""
    args = RunArgs(logdir=str(tmp_path), run_name="a", total_timesteps=100, save_every=0)
    with pytest.raises(ZeroDivisionError):
        with Run(args, "test", 10) as run:
            run.restore(make_state(), SAVEABLE)
            for k in range(3):
                run.log(make_state(k), metrics(float(k)))
            raise ZeroDivisionError
    return replace(args, resume="auto")


def test_a_name_that_is_taken_and_flags_that_differ_are_refused_by_name(stopped, tmp_path):
    refused = {
        "--run-name a: .* already exists; resume with --resume auto": {"resume": "never"},
        r"--seed 2 \(was 1\); --env-id Pong-v5 \(was Breakout-v5\)|"
        r"--env-id Pong-v5 \(was Breakout-v5\); --seed 2 \(was 1\)": {"seed": 2, "env_id": "Pong-v5"},
        r"--total-timesteps 90 \(was 100\)": {"total_timesteps": 90},
        "neither a run folder nor a checkpoint": {"run_name": None, "resume": str(tmp_path)},
        "the run has later checkpoints": {"run_name": None, "resume": str(tmp_path / "a/checkpoints/000000000020")},
    }
    before = contents(tmp_path)
    for message, flags in refused.items():
        with pytest.raises(UsageError, match=message):
            Run(replace(stopped, **flags), "test", 10)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="not empty, and not a run folder"):
        Run(replace(stopped, run_name="other"), "test", 10)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    assert {path: data for path, data in before.items() if ".lock" not in str(path)}.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("where", ["auto", "the folder", "the checkpoint"])
def test_a_run_is_found_by_name_and_by_path(where, stopped, tmp_path):
    path = {"the folder": tmp_path / "a", "the checkpoint": tmp_path / "a/checkpoints/000000000030"}.get(where)
    run = Run(stopped if path is None else replace(stopped, run_name=None, resume=str(path)), "test", 10)
    assert run.iteration == 3
    assert same(step_once(run), make_state(2))
    assert [row["step"] for row in rows(tmp_path / "a")] == [10, 20, 30, 40]


def test_after_a_kill_wandb_is_told_nothing_twice(stopped, tmp_path, monkeypatch):
    """A process that was killed at step 30 has told W&B so far, and not said so in run.json; it goes on from step 20."""
    shutil.rmtree(tmp_path / "a/checkpoints/000000000030")
    record = json.loads((tmp_path / "a/run.json").read_text())
    known = {"id": "i", "project": "p", "entity": None, "logged_to": 10}
    record |= {"wandb": known, "flags": record["flags"] | {"track": True}}
    (tmp_path / "a/run.json").write_text(json.dumps(record))
    given, steps = fake_wandb_init(monkeypatch)
    with Run(replace(stopped, track=True), "test", 10) as run:
        run.restore(make_state(), SAVEABLE)
        for _ in range(3):
            run.log(make_state(), metrics(1.0))
    assert (given["id"], given["resume"], steps) == ("i", "allow", [40, 50])
    assert json.loads((tmp_path / "a/run.json").read_text())["wandb"]["logged_to"] == 50


def test_more_steps_are_allowed_and_what_they_change_is_said(stopped, tmp_path, capsys):
    run = Run(replace(stopped, total_timesteps=200, save_every=5, wandb_tags=("a",), track_params=True), "test", 10)
    step_once(run)
    out = capsys.readouterr().out
    assert "a resumes from step 30: 170 steps in 17 updates" in out
    assert "--total-timesteps 200 instead of 100: nothing is annealed" in out
    args = args_of(ppo, [], tmp_path, total_timesteps=2_000_000)
    said = stretched(args, to_store(replace(args, total_timesteps=1_000_000)), 500_000)
    assert "--anneal-lr" in said and "from 50% to 25%" in said


def test_a_longer_run_has_its_old_length_until_its_first_checkpoint(tmp_path):
    """So that nothing is lost if it is called off: the old command and reports still find a finished run."""
    args = RunArgs(logdir=str(tmp_path), run_name="a", total_timesteps=20, save_every=0)
    with Run(args, "test", 10) as run:
        run.restore(make_state(), SAVEABLE)
        for k in range(2):
            run.log(make_state(k), metrics(1.0))
    longer = replace(args, total_timesteps=40, resume="auto", save_every=900)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            with Run(longer, "test", 10) as run:
                run.log(run.restore(make_state(), SAVEABLE), metrics(5.0))
                raise ZeroDivisionError
    record = read_record(tmp_path / "a")
    assert record["flags"]["total_timesteps"] == record["finished_at"] == 20 and not record.get("extended_from")
    with pytest.raises(RunIsFinished):
        Run(replace(args, resume="auto"), "test", 10)
    step_once(Run(replace(longer, save_every=0), "test", 10))
    record = read_record(tmp_path / "a")
    assert (record["flags"]["total_timesteps"], record["extended_from"], record.get("finished_at")) == (40, [20], None)
    (tmp_path / "a/run.json").write_text("{")  # the checkpoint knows it too
    step_once(Run(replace(longer, save_every=0), "test", 10))
    assert read_record(tmp_path / "a")["extended_from"] == [20] and read_record(tmp_path / "a")["finished_at"] == 40


def test_metrics_of_attempts_without_a_checkpoint_are_kept(tmp_path):
    """Also if an attempt after them logs nothing."""
    args = RunArgs(logdir=str(tmp_path), run_name="a", total_timesteps=40, save_every=900, resume="auto")
    for updates in (2, 0, 1, 0):
        with pytest.raises(ZeroDivisionError):
            with Run(args, "test", 10) as run:
                state = run.restore(make_state(), SAVEABLE)
                for _ in range(updates):
                    run.log(state, metrics(1.0))
                raise ZeroDivisionError
    kept = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "a").glob("metrics*")}
    assert kept == {"metrics.jsonl.before": 2, "metrics.jsonl.before2": 1, "metrics.jsonl": 0}


def test_environments_that_start_anew_hide_their_returns(tmp_path):
    """Those of your own too, whose state holds their statistics anywhere."""
    args = RunArgs(logdir=str(tmp_path), run_name="a", total_timesteps=40, save_every=0)
    env = SimpleNamespace(saveable=False, num_actions=2, obs_spec=SAVEABLE.obs_spec)
    with pytest.raises(ZeroDivisionError):
        with Run(args, "test", 10) as run:
            run.log(run.restore(make_state(), env), metrics(1.0))
            raise ZeroDivisionError
    with Run(replace(args, resume="auto"), "test", 10) as run:
        state = make_state()._replace(env_state={"mine": (jnp.ones(2), EpisodeStats.zeros(2))})
        number, stats = run.restore(state, env).env_state["mine"]
        assert not stats.counts.any() and number.all() and not stats.to_count().any()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    args = RunArgs(logdir=str(tmp_path), run_name="a", total_timesteps=100, resume="auto")
    for updates in (3, 2):
        with pytest.raises(ZeroDivisionError):
            with Run(args, "test", 10) as run:
                assert run.iteration == 0
                run.restore(make_state(), SAVEABLE)
                for _ in range(updates):
                    run.log(make_state(), metrics(1.0))
                raise ZeroDivisionError
    assert [row["step"] for row in rows(tmp_path / "a")] == [10, 20]
    assert [step for step, _ in scalars(tmp_path / "a")["losses/policy_loss"]] == [10, 20]
    with pytest.raises(UsageError, match="--seed 2"):
        Run(replace(args, seed=2), "test", 10)


def test_what_has_no_checkpoint_is_not_started_over_unless_none_was_due(stopped, tmp_path):
    """Runs that were to write none, or were finished; what was logged stays."""
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    for change in ({"finished_at": 90}, {"flags": record["flags"] | {"keep_checkpoints": 0}}):
        (tmp_path / "a" / "run.json").write_text(json.dumps(record | change))
        with pytest.raises(UsageError, match="no checkpoint to resume from"):
            Run(stopped, "test", 10)
    assert len(rows(tmp_path / "a")) == 3


@pytest.mark.parametrize("lost", ["name", "algorithm", "script", "seed", "flags", "sittings", None])
def test_a_damaged_record_is_made_anew_from_the_checkpoint(lost, stopped, tmp_path, capsys):
    path = tmp_path / "a" / "run.json"
    record = json.loads(path.read_text())
    if lost is None:
        path.unlink()
    else:
        path.write_text(json.dumps({name: value for name, value in record.items() if name != lost}))
    step_once(Run(stopped, "test", 10))
    assert "rebuilt from the checkpoint" in capsys.readouterr().out
    made = json.loads(path.read_text())
    assert [made[name] for name in ("name", "algorithm", "script", "seed")] == ["a", "test", "flags", 1]
    assert [sitting["from_step"] for sitting in made["sittings"]] == [30]


def test_a_name_whose_run_did_nothing_yet_is_free(tmp_path):
    """Out of memory in its first update, say: the next try has other flags."""
    args = RunArgs(logdir=str(tmp_path), run_name="a", total_timesteps=100)
    with pytest.raises(MemoryError):
        with Run(args, "test", 10):
            raise MemoryError
    (tmp_path / "a" / "run.json.incomplete").write_text("")  # and killed while it wrote that
    for resume in ("never", "auto"):
        run = Run(replace(args, seed=2, resume=resume), "test", 10)
        with pytest.raises(MemoryError):
            with run:
                raise MemoryError
    step_once(Run(replace(args, seed=3), "test", 10))
    assert len(list((tmp_path / "a").glob("events*"))) == 1
    with pytest.raises(UsageError, match="already exists"):
        Run(args, "test", 10)


def test_a_run_that_was_continued_is_asked_to_stop(stopped, tmp_path):
    with pytest.raises(Interrupted):
        with Run(stopped, "test", 10) as run:
            state = run.restore(make_state(), SAVEABLE)
            for k in range(2):
                run.log(state, metrics(1.0))
                if k == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                    wait_for(lambda: run.signals.received)
            raise AssertionError("not reached")
    assert list(run.checkpoints.steps()) == [40, 50]


def test_a_checkpoint_that_could_not_be_written_stops_the_run_an_update_later(stopped, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="the checkpoint could not be written .No space left on device"):
        with Run(stopped, "test", 10) as run:
            state = run.restore(make_state(), SAVEABLE)
            monkeypatch.setattr("utils.runs.checkpoints.checksum", full)
            run.log(state, metrics(1.0))
            wait_for(run.checkpoints.writing.done)
            run.next_save = float("inf")
            run.log(state, metrics(1.0))
            raise AssertionError("not reached")
    monkeypatch.undo()
    assert Run(stopped, "test", 10).iteration == 3


def test_a_run_whose_end_is_not_finite_is_not_finished(tmp_path):
    args = RunArgs(logdir=str(tmp_path), run_name="a", total_timesteps=20, save_every=0, stop_if_not_finite=False)
    with Run(args, "test", 10) as run:
        run.restore(make_state(), SAVEABLE)
        for k in range(2):
            run.log(make_state(k), metrics(np.nan if k else 1.0))
    assert not (tmp_path / "a" / "model").exists()
    assert read_record(tmp_path / "a")["diverged_at"] == 20
    run = Run(replace(args, resume="auto"), "test", 10)
    assert run.iteration == 1
    step_once(run)
    assert "diverged_at" not in read_record(tmp_path / "a") and read_record(tmp_path / "a")["finished_at"] == 20


@pytest.mark.parametrize("loss", ["moved", "deleted", "replaced"])
def test_a_folder_that_is_moved_or_deleted_stops_the_run_and_does_not_appear_anew(loss, stopped, tmp_path, capsys):
    there, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    said = f"was moved to {elsewhere} during the run; .* --resume {elsewhere}"
    said = said if loss == "moved" else rf"{there}: (metrics.jsonl )?was (replaced or )?deleted during the run"
    with pytest.raises(FolderLost, match=said):
        with Run(stopped, "test", 10) as run:
            state = run.restore(make_state(), SAVEABLE)
            run.log(state, metrics(1.0))
            if loss == "moved":
                there.rename(elsewhere)
            elif loss == "deleted":
                run.checkpoints.wait()
                shutil.rmtree(there)
            else:
                (there / "metrics.jsonl").rename(there / "old.jsonl")
                (there / "metrics.jsonl").write_text("")
            for _ in range(2):
                run.log(state, metrics(1.0))
            raise AssertionError("not reached")
    assert there.exists() == (loss == "replaced") and "logs: " not in capsys.readouterr().out
    if loss == "moved":
        assert Run(replace(stopped, run_name=None, resume=str(elsewhere)), "test", 10).iteration == 3


def test_a_folder_in_use_is_refused(stopped):
    with Run(stopped, "test", 10):
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()} on "):
            Run(stopped, "test", 10)
    Run(stopped, "test", 10)


def test_a_process_that_died_left_its_folder_free(stopped):
    code = "import sys, os; from utils.runs.folder import claim; from pathlib import Path; "
    code += "lock = claim(Path(sys.argv[1])); print('has it', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, f"{stopped.logdir}/a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "has it\n"
    with pytest.raises(UsageError, match="in use by process"):
        Run(stopped, "test", 10)
    holder.kill()
    holder.wait()
    assert Run(stopped, "test", 10).iteration == 3


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_whatever_is_damaged_in_its_folder_it_goes_on_or_says_in_a_line_why_not(count, stopped, tmp_path):
    rng, went_on = np.random.default_rng(count), 0
    for k in range(count):
        folder = shutil.copytree(tmp_path / "a", tmp_path / f"copy-{k}")
        what = damage(folder, rng)
        try:
            run = Run(replace(stopped, run_name=folder.name), "test", 10)
            state = step_once(run)
        except UsageError as error:
            assert "\n" not in str(error), what
        else:
            went_on += 1
            assert run.iteration in (3, 4) and same(state, make_state(run.iteration - 2)), what
            assert rows(folder)[-1]["step"] == 10 * run.iteration
        shutil.rmtree(folder)
    assert went_on > count / 2


@pytest.mark.parametrize("stop", [True, False])
def test_what_is_not_finite_stops_the_run_and_is_not_saved(stop, tmp_path, monkeypatch, capsys):
    # a disk that is slow: the checkpoint before is named though it was still being written
    monkeypatch.setattr("utils.runs.checkpoints.to_disk", lambda _: time.sleep(0.01))
    args = RunArgs(logdir=str(tmp_path), run_name="a", total_timesteps=50, save_every=0, stop_if_not_finite=stop)

    def learn():
        with Run(args, "test", 10) as run:
            run.restore(make_state(), SAVEABLE)
            for k in range(5):
                state = make_state(k)
                if k == 2:
                    state = state._replace(params=jax.tree.map(lambda x: x.at[0].set(np.nan), state.params))
                run.log(state, metrics(np.inf if k == 3 else 1.0))

    if stop:
        with pytest.raises(NotFinite) as error:
            learn()
        said = str(error.value)
        assert "update 3 (step 30): the parameters of encoder, the parameters of actor_critic" in said
        assert read_record(tmp_path / "a")["diverged_at"] == 30
        assert "the last checkpoint is from step 20" in said and "--resume auto --debug-nans" in said and "\n" not in said
        assert list(Run(replace(args, resume="auto"), "test", 10).checkpoints.steps()) == [10, 20]
    else:
        learn()
        assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == ["000000000020", "000000000050"]
        out = capsys.readouterr().out
        assert "diverged_at" not in read_record(tmp_path / "a")  # it recovered
        assert "not finite at step 30: this step is not saved" in out and "step 40: this step is not saved" in out


def test_divergence_is_recorded_until_a_run_gets_beyond(tmp_path):
    """With the usual interval of checkpoints, an update is dispatched before the one before it is known to be bad."""
    args = RunArgs(logdir=str(tmp_path), run_name="a", total_timesteps=50, save_every=0)

    def learn(args, numbers, ends=NotFinite):
        with pytest.raises(ends), Run(args, "test", 10) as run:
            state = run.restore(make_state(), SAVEABLE)
            for number in numbers:
                run.log(state, metrics(number))
                run.next_save = float("inf")
            raise ends
        return read_record(tmp_path / "a").get("diverged_at")

    assert learn(args, (1.0, np.nan, 1.0, 1.0)) == 20
    again = replace(args, resume="auto")
    assert learn(again, (), KeyboardInterrupt) == 20 and learn(again, (), FloatingPointError) == 20
    assert learn(again, (1.0, 1.0, 1.0), ZeroDivisionError) is None


def test_an_update_needs_no_learning_rate_among_its_metrics(tmp_path):
    """Those of an own script may have other names: its run is saved all the same."""
    with Run(RunArgs(logdir=str(tmp_path), total_timesteps=20), "test", 10) as run:
        run.restore(make_state(), SAVEABLE)
        for k in range(2):
            run.log(make_state(k), {name: x for name, x in metrics(1.0).items() if name != "charts/learning_rate"})
    assert (run.folder / "model").is_dir() and json.loads((run.folder / "run.json").read_text())["finished_at"] == 20


def test_a_script_whose_loss_is_not_finite_stops(tmp_path):
    args = args_of(ppo, ["--env-id=CartPole-v1", *SMALL, "--learning-rate=1e30"], tmp_path)
    with pytest.raises(NotFinite, match="losses/policy_loss.*--debug-nans"):
        ppo.main(args)


def test_rows_after_a_step_and_half_a_row_are_cut(tmp_path):
    lines = [json.dumps({"step": step}) for step in (10, 20, 30)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 4')
    assert last_step(tmp_path) == 30
    assert [row["step"] for row in cut_back(tmp_path, 20)] == [10, 20] and path.read_text() == '{"step": 10}\n{"step": 20}\n'
    assert cut_back(tmp_path, 0) == [] and path.read_text() == ""
    path.write_text('{"step": 10}')  # whole, but for the end of the line
    assert cut_back(tmp_path, 10) == []
    assert (cut_back(tmp_path / "none", 10), last_step(tmp_path / "none")) == ([], 0)
    path.write_text('{"step": 10}\n{"step": 1e999}\nnull\n{"step": 40}\n{"step": 50}\n')  # what is no row costs no other
    assert len(cut_back(tmp_path, 40)) == 2 and path.read_text() == '{"step": 10}\n{"step": 40}\n'


def test_a_folder_that_cannot_be_written_is_said_in_a_line(stopped, tmp_path, capsys):
    mounted = [["mount", "--bind", str(tmp_path), str(tmp_path)], ["mount", "-o", "remount,ro,bind", str(tmp_path)]]
    if any(subprocess.run(typed, capture_output=True).returncode for typed in mounted):
        pytest.skip("nothing can be mounted here")
    try:
        for run in ({}, {"run_name": "new"}):
            with pytest.raises(OSError, match="Read-only file system"):
                with Run(replace(stopped, **run), "test", 10):
                    raise AssertionError("not reached")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_second_signal_ends_it_at_once_and_a_first_one_what_has_nothing_to_lose(tmp_path):
    """In processes of their own, whose main thread is where Python heeds no signal."""
    code = """
import os, signal, sys, threading, time
import jax
from tests.states import make_state
from tests.utils.runs.test_resume import SAVEABLE
from tests.utils.runs.test_run import metrics
from utils.runs.flags import RunArgs
from utils.runs.run import Run
from utils.runs.signals import ECHO_SECONDS
updates, times, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with Run(RunArgs(logdir=sys.argv[4], run_name=name, total_timesteps=100), "test", 10) as run:
    state = run.restore(make_state(), SAVEABLE)
    for _ in range(updates):
        run.log(state, metrics(1.0))
    def send():
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(ECHO_SECONDS + 0.2)
    threading.Thread(target=send, daemon=True).start()
    busy = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0] > -1, lambda x: x + 1.0, x))
    jax.block_until_ready(busy(jax.numpy.zeros(9)))
"""
    for name, updates, times in (("nothing-to-lose", 0, 1), ("twice", 3, 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(updates), str(times), name, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (done.returncode, done.stderr) == (143, ""), done.stderr
    assert "stopped before there was anything to save" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["twice"]


def test_load_run_takes_other_flags_and_says_what_is_missing(tmp_path):
    ppo.main(args_of(ppo, ["--env-id=CartPole-v1", *SMALL], tmp_path, run_name="a"))
    params, agent, env = load_run(tmp_path / "a", num_envs=3)
    _, obs = env.reset()
    z = agent.encoder.apply(params.encoder, obs)
    assert agent.actor_critic.apply(params.actor_critic, z, obs)[0].shape == (3, 2)
    with pytest.raises(UsageError, match="neither a model nor a checkpoint"):
        load_run(tmp_path)
    with jax.enable_x64(True), pytest.raises(UsageError, match="load them with jax_enable_x64 off"):
        load_run(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "model")
    assert same(load_run(tmp_path / "a")[0], params)
    last = tmp_path / "a" / "checkpoints" / "000000000320"
    assert same(load_run(last)[0], params)
    # a run that was made longer and did not end: not the model of the shorter one
    begin_writing(tmp_path / "a" / "model", {"params": params}, find(last).progress | {"step": 160})()
    assert find_params(tmp_path / "a").path == last
    (last / "checksums.json").unlink()
    with pytest.warns(UserWarning, match="000000000320 is damaged"):
        assert find_params(tmp_path / "a").path.name == "model"
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["flags"]["env_id"] == "CartPole-v1" and record["seed"] == 1 and record["finished_at"] == 320
    (sitting,) = record["sittings"]
    assert {"command", "git_commit", "git_dirty", "device", "versions"} < set(sitting)
    assert sitting["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_script_that_was_asked_to_stop_says_so_by_its_exit_code(signum, code, monkeypatch):
    def main(args):
        raise Interrupted(signum)

    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(SystemExit) as end:
        run_script(main, RunArgs)
    assert end.value.code == code


def test_the_script_says_finished_and_refuses_in_one_line(stopped, monkeypatch, capsys):
    def main(args):
        Run(args, "test", 10)

    typed = [f"--logdir={stopped.logdir}", "--run-name=a", "--save-every=0"]
    for flags, code, words in (
        (["--resume=auto", "--total-timesteps=30"], 2, "--total-timesteps 30 (was 100)"),
        (["--total-timesteps=100"], 2, "already exists"),
    ):
        monkeypatch.setattr("sys.argv", ["script", *typed, *flags])
        with pytest.raises(SystemExit) as end:
            run_script(main, RunArgs)
        assert end.value.code == code and words in capsys.readouterr().err
    with Run(stopped, "test", 10) as run:
        run.restore(make_state(), SAVEABLE)
        for k in range(7):
            run.log(make_state(k), metrics(1.0))
    monkeypatch.setattr("sys.argv", ["script", *typed, "--resume=auto", "--total-timesteps=100"])
    run_script(main, RunArgs)
    assert "already finished after 100 steps" in capsys.readouterr().out
