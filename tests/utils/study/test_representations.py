"""What is measured of latents and world models."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import deep_spi
from benchmarks import representations
from benchmarks.representations import MEASURES, OF_MODEL, dormant_share, effective_rank, measure, probe, readable
from envs.registry import make_env
from utils.runs.flags import UsageError, make_args
from utils.runs.load_run import LoadedRun


def test_latents_by_hand():
    axes = np.concatenate([np.eye(4), -np.eye(4)])
    assert effective_rank(axes) == pytest.approx(4)
    assert effective_rank(axes @ np.diag([1, 1, 0, 0]) + 7) == pytest.approx(2)
    shares = np.array([3, 1]) / 4
    assert effective_rank(axes @ np.diag([3, 1, 0, 0])) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    activity = np.array([1.0, 1.0, 0.04, 0.0])  # 2.5% of their mean is 0.01275
    assert dormant_share(np.stack([activity, -activity])) == 0.25


def test_probes_by_hand():
    rng = np.random.default_rng(0)
    z, new_z = rng.normal(size=(400, 5)), rng.normal(size=(300, 5))
    linear = rng.normal(size=(5, 3))
    assert probe(z, z @ linear + 2, new_z, new_z @ linear + 2) == pytest.approx(1, abs=1e-3)
    assert -0.1 < probe(z, rng.normal(size=(400, 3)), new_z, rng.normal(size=(300, 3))) < 0.05
    half = np.concatenate([z @ linear, rng.normal(size=(400, 3)) * np.linalg.norm(linear, axis=0)], axis=1)
    new_half = np.concatenate([new_z @ linear, rng.normal(size=(300, 3)) * np.linalg.norm(linear, axis=0)], axis=1)
    assert 0.4 < probe(z, half, new_z, new_half) < 0.6
    frames = np.arange(2 * 84 * 84, dtype=np.uint8).reshape(1, 2, 84, 84)
    np.testing.assert_allclose(readable(frames)[0, 13], frames[0, 1, 7:14, 7:14].mean() / 255, rtol=1e-6)
    assert readable(np.ones((3, 10, 10, 4))).shape == (3, 400)


def test_what_the_world_model_adds_is_in_proportion_to_its_coefficients():
    """A network that has not learned: its transition is near the identity; and twice the coefficients are twice the losses."""
    args = make_args(deep_spi.Args, env_id="Asterix-MinAtar", num_envs=4, num_steps=16, num_minibatches=1)
    env = make_env(args)
    agent = deep_spi.make_agent(args, env.num_actions)
    params = jax.jit(deep_spi.init_params, static_argnums=1)(jax.random.key(0), agent, env.reset()[1])
    run = LoadedRun(params, agent, env, args, {"script": "deep_spi"})
    found = measure(run, jax.random.key(1))
    assert set(found) == {*MEASURES, *OF_MODEL} and all(np.isfinite(value) for value in found.values())
    assert -0.5 < found["transition_skill"] < 0.3 and found["noise"] > 0 and found["dormant"] < 0.5 < found["effective_rank"]
    more = replace(args, reward_loss_coef=2 * args.reward_loss_coef, transition_loss_coef=2 * args.transition_loss_coef)
    doubled = measure(run._replace(args=more), jax.random.key(1))
    for name in ("utility_mean", "utility_std", "gradient_share"):
        assert doubled[name] == pytest.approx(2 * found[name], rel=1e-3)
    for name in (*MEASURES, "transition_skill", "reward_r2"):
        assert doubled[name] == found[name]


def test_mistakes_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for flags, words in (
        ({"runs": (tmp_path / "none",)}, "there is no such folder"),
        ({"runs": (tmp_path / "empty",)}, "holds no folders of runs"),
        ({"runs": (tmp_path,)}, "no finished runs"),
        ({"runs": (tmp_path,), "num_envs": 1}, "--num-envs 1"),
        ({"runs": (tmp_path,), "num_steps": 0}, "--num-steps 0"),
        ({"runs": (tmp_path,), "output": tmp_path / "a" / "b.csv"}, "there is no folder"),
    ):
        with pytest.raises(UsageError) as error:
            representations.main(representations.Args(**flags))
        assert words in str(error.value)
