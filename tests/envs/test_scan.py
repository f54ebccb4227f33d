"""Policies that act in one half of the environments while the other half's emulators are at work."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from envs.registry import make_pool
from envs.scan import Halves, scan_steps
from tests.states import State
from tests.utils.test_devices import two
from utils.devices import distribute, use_devices


def by_observation(obs, key, num_actions):
    """An action that the observation decides, and two things to note of it."""
    digest = jnp.sum(jnp.abs(obs.reshape(len(obs), -1).astype(jnp.float32) * 1000.0).astype(jnp.uint32) % 977, axis=1)
    return (digest % num_actions).astype(jnp.int32), (digest, jnp.stack([digest, digest + 1], axis=1))


def by_key(obs, key, num_actions):
    """An action that no observation has to be waited for; of all environments those of the halves."""
    if len(obs) == 8:
        first, second = (by_key(part, k, num_actions) for part, k in zip(jnp.split(obs, 2), jax.random.split(key), strict=True))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    return jax.random.randint(key, len(obs), 0, num_actions), (obs.reshape(len(obs), -1)[:, 0], jnp.ones((len(obs), 2)))


def rollouts(env, length, act, count=3):
    """All that is known of some rollouts, one after the other, [K, T, B]."""
    policy = partial(act, num_actions=env.num_actions)
    keys = jax.random.split(jax.random.key(0), length)
    state = State(None, None, *env.reset(), None, None, None)
    state = distribute(state)
    scan = jax.jit(lambda env_state, obs: scan_steps(policy, env, env_state, obs, keys))
    carry, found = (state.env_state, state.obs), []
    for _ in range(count):
        *carry, steps = scan(*carry)
        obs = np.asarray(steps.obs)
        assert_array_equal(obs[length], carry[1])
        found.append(jax.device_get(steps._replace(obs=obs)))
    return jax.tree.map(lambda *x: np.stack(x), *found)


@cache
def of_the_whole(env_id, length, act):
    return rollouts(make_pool(env_id, 8, 3), length, act)


def halves(env_id, **options):
    return Halves(*(make_pool(env_id, 8, 3, part=part, **options) for part in (slice(4), slice(4, 8))))


@pytest.mark.parametrize(
    "env_id, length, act, others",
    [
        pytest.param("CartPole-v1", 60, by_observation, {}, marks=pytest.mark.slow),
        ("CartPole-v1", 60, by_key, {}),
        ("CartPole-v1", 1, by_key, {"stepping": "callback"}),
        pytest.param("CartPole-v1", 60, by_key, {"num_devices": 2}, marks=two),
        ("Breakout-v5", 30, by_observation, {}),
    ],
)
def test_halves_do_what_the_whole_does(env_id, length, act, others):
    """The same steps, given the same actions, with ends of episodes and of rollouts; and on several devices."""
    expected = of_the_whole(env_id, length, act)
    assert expected.after.terminated.any() == (length > 1) and len(np.unique(expected.action)) > 1
    with use_devices(others.get("num_devices", 1)):
        found = rollouts(halves(env_id, **others), length, act)
    jax.tree.map(assert_array_equal, found, expected)


def test_halves_step_as_one_pool():
    whole, parts = make_pool("CartPole-v1", 8, 3), halves("CartPole-v1")
    (state, _), (state_too, _) = whole.reset(), parts.reset()
    step, step_too = jax.jit(whole.step), jax.jit(parts.step)
    for action in np.random.default_rng(0).integers(0, 2, (50, 8), np.int32):  # other actions in each half
        (state, after), (state_too, after_too) = step(state, action), step_too(state_too, action)
        jax.tree.map(assert_array_equal, after, after_too)
    assert after.terminated.any() or after.episode.previous_age.any()
