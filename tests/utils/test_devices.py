"""Several devices do what one does: the same draws, and the same sums up to their rounding."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import deep_spi
import dream_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from envs.registry import make_env
from utils.devices import by_device, distribute, make_split, on_each_device, on_one_device, use_devices
from utils.runs.flags import check_flags, make_args
from utils.runs.launch import check_run

two = pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")


def with_vectors(env):
    """Cells of the gridworld seen as unit vectors: encoders of frames take most of the time to compile."""
    env.frames = np.eye(len(env.frames), dtype=np.float32)
    env.model = env.model._replace(start=np.int32(env.model.start))  # or the second rollout would be compiled anew
    env.obs_spec = jax.ShapeDtypeStruct(env.frames.shape[1:], env.frames.dtype)
    return env


def train(script, iterations, **flags):
    """Parameters, observations and metrics after a few updates, by the two programs of a script's `main`."""
    args = make_args(script.Args, total_timesteps=10_000, **flags)
    check_flags(args)
    with use_devices(args.num_devices):
        env = make_env(args)
        env = with_vectors(env) if args.env_id == "ConfoundingGridworld-v0" else env
        agent, optimizer = script.make_agent(args, env.num_actions, env.obs_parts), script.make_optimizer(args)
        rollout = jax.jit(partial(script.rollout, env=env, agent=agent, args=args), donate_argnums=0)
        learn = jax.jit(lambda state, steps: script.learn(state, steps, env, agent, optimizer, args), donate_argnums=0)
        state = distribute(script.init_state(args, env, agent, optimizer))
        for _ in range(iterations):
            state, metrics = learn(*rollout(state))
        shares = {x.shape[0] for x in (shard.data for shard in state.obs.addressable_shards)}
        assert shares == {args.num_envs // args.num_devices}
        params = jax.tree.leaves(state.params)
        assert all(x.is_fully_replicated and len(x.sharding.device_set) == args.num_devices for x in params)
        return jax.device_get((state.params, state.obs, metrics))


SMALL = {"num_envs": 8, "num_steps": 16, "num_minibatches": 2, "fc_layers": (16,)}
SMALL |= {"adam_eps": 1e-3}  # or Adam, dividing by tiny gradients, makes much of how they are rounded
GRIDWORLD = {"env_id": "ConfoundingGridworld-v0", "latent": "categorical", "num_categories": 2, "num_classes": 4}
REPLAY = {"use_replay_buffer": True, "replay_prefill": 128, "replay_capacity": 256, "replay_ratio": 1.0}
REPLAY |= {"replay_length": 8, "replay_batch_size": 4, "dreams_from": "replay", "num_minibatches": 8}


@two
@pytest.mark.parametrize(
    "script, flags",
    [
        (ppo, GRIDWORLD | {"minibatch_by": "transition", "target_kl": 1e-4}),
        pytest.param(ppo, {"env_id": "CartPole-v1", "minibatch_by": "transition", "target_kl": 1e-4}, marks=pytest.mark.slow),
        pytest.param(deep_spi, GRIDWORLD | {"update_epochs": 1, "enforce_neighborhood": "early_stop"}, marks=pytest.mark.slow),
        pytest.param(deep_spi, {"env_id": "CartPole-v1", "enforce_neighborhood": "backtrack"}, marks=pytest.mark.slow),
        pytest.param(dream_spi, {"env_id": "Breakout-MinAtar", "dream_minibatches": 2}, marks=pytest.mark.slow),
        pytest.param(dream_spi, {"env_id": "Breakout-v5", "fc_layers": (16,)} | REPLAY, marks=pytest.mark.slow),
        pytest.param(ppo, {"env_id": "Breakout-v5", "overlap_rollout": True}, marks=pytest.mark.slow),
    ],
)
def test_two_devices_are_as_one(script, flags):
    """Of emulators and of environments in JAX: the same steps, and updates that differ by what rounding does."""
    (one, obs, metrics), (shared, obs_too, metrics_too) = (train(script, 2, num_devices=n, **SMALL | flags) for n in (1, 2))
    assert_array_equal(obs, obs_too)
    jax.tree.map(partial(assert_allclose, atol=1e-5), one, shared)
    assert metrics.keys() == metrics_too.keys()
    for name, value in metrics.items():
        assert_allclose(value, metrics_too[name], rtol=1e-3, atol=1e-5, err_msg=name)


@two
def test_what_is_split_and_what_is_not():
    rows, number = jnp.arange(4.0), jnp.asarray(1.0)
    assert by_device(rows) is rows and on_each_device(rows) is rows
    make = lambda: {"rows": 2 * jnp.arange(4.0), "number": number}  # noqa: E731
    plain = make_split(make)
    with use_devices(2):
        for found in (jax.jit(by_device)(rows), make_split(make)["rows"]):
            assert {shard.data.shape for shard in found.addressable_shards} == {(2,)}
        assert make_split(make)["number"].is_fully_replicated
        whole = jax.jit(on_each_device)(jax.jit(by_device)(rows))
        assert {shard.data.shape for shard in whole.addressable_shards} == {(4,)}
        jax.tree.map(assert_array_equal, make_split(make), plain)
    assert jax.sharding.get_mesh().empty and len(jnp.ones(2).sharding.device_set) == 1


@two
def test_a_run_leaves_nothing_for_the_next_one_in_its_process():
    args = make_args(ppo.Args, env_id="CartPole-v1")
    check_run(replace(args, num_devices=2, debug_nans=True))
    assert not jax.sharding.get_mesh().empty and jax.config.jax_debug_nans
    check_run(args)
    assert jax.sharding.get_mesh().empty and not jax.config.jax_debug_nans
    with jax.debug_nans(True):  # set by the user, not by a flag
        check_run(args)
        assert jax.config.jax_debug_nans


def unchanged(state, steps, advantages, key, agent, optimizer, args):
    metrics = dict.fromkeys(("losses/policy_loss", "charts/learning_rate"), jnp.ones(()))
    return state._replace(iteration=state.iteration + 1), metrics


@two
@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Breakout-MinAtar", "Breakout-v5"])
def test_a_run_on_two_devices_films_and_goes_on_on_one(env_id, tmp_path, capsys, monkeypatch):
    """Without learning, which the test above compares, and which takes the longest to compile."""
    monkeypatch.setattr(ppo, "update", unchanged)
    small = {"num_envs": 8, "num_steps": 16, "num_minibatches": 2, "fc_layers": (16,), "capture_video": True}
    run = partial(make_args, ppo.Args, env_id=env_id, logdir=str(tmp_path), run_name="run", resume="auto", **small)

    def said_by(args):
        with on_one_device():  # a script sets its devices for good; here, only until the end
            ppo.main(args)
        return capsys.readouterr().out

    said = said_by(run(total_timesteps=256, num_devices=2))
    assert "as 2 devices" in said and "video: " in said and "no video" not in said
    said = said_by(run(total_timesteps=384))
    assert "as 2 devices" not in said and "384/384 steps" in said
