"""Logging: what is written, W&B offline, scores."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import PPO, run
from tests.event_files import scalars
from utils.dreams import traces
from utils.runs import scores
from utils.runs.logs import Logger
from utils.occasionally import MEASURED
from utils.runs.flags import RunArgs, UsageError, check_flags

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


def test_interrupted_run_keeps_its_last_metrics_and_nan_is_said_once(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        with Logger(RunArgs(logdir=str(tmp_path), total_timesteps=100), "test", 10) as logger:
            for _ in range(3):
                logger.log(metrics(float("nan")))
            raise KeyboardInterrupt
    assert len(scalars(logger.folder)["losses/policy_loss"]) == 3
    out = capsys.readouterr().out
    assert out.count("not finite") == 1 and "stopped after 30 steps" in out


def test_scores_by_hand():
    pong = scores.reference("Pong-v5")
    assert pong.human_normalized(pong.random) == 0 and pong.human_normalized(pong.human) == 1
    assert pong.relative_improvement(pong.cleanrl_ppo_mean) == 0
    assert scores.reference("CartPole-v1") is None


def test_unknown_environment_gets_a_hint():
    with pytest.raises(UsageError, match="did you mean Breakout-v5"):
        check_flags(RunArgs(env_id="Brakout-v5"))


def test_wandb_offline(tmp_path):
    """A tracked run in a process of its own writes an offline W&B run that holds the scalars."""
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = ["--env-id=CartPole-v1", "--num-envs=4", "--num-steps=8", "--total-timesteps=96", "--fc-layers=8"]
    track = ["--track", "--wandb-project-name=p", "--wandb-group=g", "--wandb-tags", "a", "b", f"--logdir={tmp_path}"]
    script = str(ROOT / "ppo_atari_envpool_xla_jax_scan.py")
    done = subprocess.run([sys.executable, script, *flags, *track], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    content = files[0].read_bytes()
    for text in (b"losses/policy_loss", b"charts/SPS", b"total_timesteps"):
        assert text in content, text
