"""Ratios of all actions, and the two ways to hold them."""

from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import deep_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from tests.probes import CueEnv, make_iteration, state_without_env
from tests.utils.dreams.test_dreams import PerAction
from tests.utils.dreams.test_replay import noise
from utils.distributions import Categorical, straight_through
from utils.neighborhood import SHRINK, TRIES, backtrack, outside, ratio_metrics


def test_ratios_by_hand():
    log_ratios = jnp.log(jnp.array([[1.1, 0.9], [1.11, 1.0], [0.89, 1.0], [1.0, 1.0]]))
    assert_array_equal(outside(log_ratios, 0.1001), [False, True, True, False])
    assert outside(jnp.array([jnp.nan, 0.0]), 0.1)
    metrics = ratio_metrics(log_ratios, jnp.array([True, True, False, True]), 0.1001)
    assert_allclose([metrics["spi/ratio_max"], metrics["spi/ratio_min"]], [1.11, 0.89], rtol=1e-6)
    assert_allclose(metrics["spi/outside_fraction"], 1 / 3)


def two_states(params):
    """The ratios of the second state jump as soon as the code is another one."""
    jump = jnp.where(params["code"] == 0.0, 0.0, 9.0)
    return jnp.stack([jnp.stack([params["x"], -params["x"]]), jnp.stack([jump, -jump])])


VALID = jnp.array([True, True])
OLD = {"x": 0.0, "code": 0.0}


def test_backtracking_by_hand():
    move = jax.jit(partial(backtrack, OLD, log_ratios=two_states, valid=VALID, eps=0.1))
    # log 1.1 = 0.0953 and log 0.9 = -0.105: x = 0.5 * 0.7^5 = 0.084 is the first inside
    params, metrics = move([{"x": 0.5, "code": 0.0}])
    assert_allclose(params["x"], 0.5 * 0.7**5, rtol=1e-5)
    assert_allclose(metrics["spi/step_fraction"], 0.7**5, rtol=1e-5)
    assert_allclose(metrics["spi/ratio_max"], np.exp(0.5 * 0.7**5), rtol=1e-5)
    assert metrics["spi/outside_fraction"] == 0 and metrics["spi/step_target"] == 0
    # near enough: the target itself
    params, metrics = move([{"x": 0.03, "code": 0.0}])
    assert params["x"] == jnp.float32(0.03) and metrics["spi/step_fraction"] == 1
    # no step of the code will do, however small
    params, metrics = move([{"x": 0.5, "code": 1.0}, {"x": 0.5, "code": 0.0}])
    assert_allclose(params["x"], 0.5 * 0.7**5, rtol=1e-5)
    assert params["code"] == 0 and metrics["spi/step_target"] == 1 and metrics["spi/outside_fraction"] == 0
    # neither will do
    for target in ({"x": 0.5, "code": 1.0}, {"x": jnp.nan, "code": 0.0}, {"x": jnp.inf, "code": 0.0}):
        params, metrics = move([target])
        assert params == OLD and metrics["spi/step_fraction"] == 0 and metrics["spi/outside_fraction"] == 0


def change(old, logits):
    return jax.nn.log_softmax(logits) - jax.nn.log_softmax(old)


@jax.jit
def leaves(old, logits, eps):
    return jnp.any(outside(change(old, logits), eps))


@jax.jit
def backtracked(old, target, eps):
    return backtrack(old, [target], partial(change, old), jnp.ones(6, bool), eps)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(0.01, 30), eps=st.floats(0.02, 0.5))
def test_backtracking_goes_as_far_as_the_grid_allows(seed, size, eps):
    """Against the obvious loop, for softmax policies of 6 states."""
    rng = np.random.default_rng(seed)
    old, step = (rng.normal(size=(6, 3)).astype(np.float32) for _ in range(2))
    step *= np.float32(size)
    params, metrics = backtracked(old, old + step, eps)
    found = next((f for f in SHRINK ** np.arange(TRIES) if not leaves(old, old + f * step, eps)), 0.0)
    assert_allclose(metrics["spi/step_fraction"], found, rtol=1e-5)
    assert not leaves(old, params, eps + 1e-6)


ARGS = ppo.Args(num_envs=8, num_steps=4, num_minibatches=2, total_timesteps=320, fc_layers=(16,))
AGENT, OPTIMIZER = ppo.make_agent(ARGS, 4), ppo.make_optimizer(ARGS)


@cache
def rolled_out():
    """A policy of vectors, with its own rollout, and the advantages."""
    steps = noise(1, 4, 8, obs_shape=(5,), num_actions=4)
    steps = steps._replace(obs=100.0 * steps.obs)  # so that a small step in the parameters changes the policy

    @jax.jit
    def start(key):
        params = ppo.init_params(key, AGENT, steps.obs[0])
        recorded = steps._replace(log_probs=jnp.zeros((4, 8, 4)), valid=jnp.ones((4, 8), bool))
        return params, ppo.policy_change(params, recorded, AGENT)

    params, policy = start(jax.random.key(0))
    steps = ppo.Rollout(*steps)._replace(log_probs=policy)
    return params, steps, jnp.asarray(np.random.default_rng(2).normal(size=(4, 8)), jnp.float32)


@cache
def update(mode):
    """One program for all learning rates."""

    @jax.jit
    def of(params, steps, advantages, learning_rate):
        args = replace(ARGS, learning_rate=learning_rate, enforce_neighborhood=mode)
        state = state_without_env(ppo, params, OPTIMIZER)
        state, metrics = ppo.update(state, steps, advantages, jax.random.key(3), AGENT, OPTIMIZER, args)
        return state, metrics, ppo.policy_change(state.params, steps, AGENT)

    return of


def updated(learning_rate, mode="none"):
    """An update of a policy with its own rollout: the parameters before it, what it returned, and the change of the policy."""
    params, *rollout = rolled_out()
    return jax.device_get((params, *update(mode)(params, *rollout, learning_rate)))


def test_backtracking_holds_the_whole_rollout_inside():
    valid = np.asarray(rolled_out()[1].valid)
    *_, moved = updated(0.003)
    assert np.mean(outside(jnp.asarray(moved), 0.1)) > 0.3
    params, state, metrics, moved = updated(0.003, "backtrack")
    assert not outside(jnp.asarray(moved), 0.1 + 1e-6).any()
    assert metrics["spi/outside_fraction"] == 0 and 0 < metrics["spi/step_fraction"] < 1
    assert_allclose(metrics["spi/ratio_max"], np.exp(moved).max(), rtol=1e-4)
    assert 1.02 < metrics["spi/ratio_max"] <= 1.1  # it did not give up more than it had to
    assert not valid.all() and (moved[~valid] == 0).all()
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        assert np.isfinite(b).all() and (a.ndim < 2 or np.any(a != b))


def test_small_updates_are_left_alone():
    _, alone, *_ = updated(1e-5)
    for mode in ("backtrack", "early_stop"):
        _, state, metrics, _ = updated(1e-5, mode)
        assert metrics.get("spi/step_fraction", 1) == 1
        assert int(state.opt_state[1].count) == 8
        for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(state.params), strict=True):
            assert_allclose(a, b, atol=1e-7)


def test_early_stop_takes_no_step_after_one_that_went_too_far():
    """The first step goes too far already: the parameters are those after it, and the others were not taken."""
    _, state, metrics, _ = updated(0.1, "early_stop")

    @jax.jit
    def first_step(params, steps, advantages):
        shuffle_key, loss_key = jax.random.split(jax.random.key(3))
        first, env = ppo.minibatch_indices(shuffle_key, ARGS)
        batch = ppo.gather(steps, advantages, first[0], env[0], ARGS)
        key = jax.random.split(loss_key, first.shape[0])[0]
        grads, _ = jax.grad(ppo.loss_fn, has_aux=True)(params, batch, key, AGENT, ARGS)
        updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
        return optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))

    for a, b in zip(jax.tree.leaves(first_step(*rolled_out())), jax.tree.leaves(state.params), strict=True):
        assert_allclose(a, b, atol=2e-3)
    assert int(state.opt_state[1].count) == 1  # of 8 minibatches, the second saw it
    assert metrics["spi/outside_fraction"] > 0


class CodeEncoder(nn.Module):
    """A code of two variables with four classes, from one matrix: compiling the script's networks takes longer."""

    @nn.compact
    def __call__(self, obs):
        logits = (obs @ self.param("w", nn.initializers.normal(1.0), (obs.shape[1], 8))).reshape(-1, 2, 4)
        return straight_through(nn.one_hot(jnp.argmax(logits, axis=-1), 4), nn.softmax(logits))


def test_backtracking_holds_categorical_policies_in_training():
    """Through the script's own rollout, whose log-probabilities are those of the policy that acted."""
    code = {"latent": "categorical", "num_categories": 2, "num_classes": 4}
    args = deep_spi.Args(num_envs=16, num_steps=4, num_minibatches=2, total_timesteps=64 * 8, fc_layers=(), **code)
    args = replace(args, learning_rate=0.01, enforce_neighborhood="backtrack")
    env = CueEnv(16)
    agent, optimizer = deep_spi.make_agent(args, env.num_actions, env.obs_parts), deep_spi.make_optimizer(args)
    agent = agent._replace(encoder=CodeEncoder(), transition=PerAction(Categorical), reward=PerAction())
    state = deep_spi.init_state(args, env, agent, optimizer)
    iteration = make_iteration(deep_spi, env, agent, optimizer, args)
    fractions = []
    for _ in range(8):
        state, metrics = iteration(state)
        assert metrics["spi/outside_fraction"] == 0 and metrics["spi/ratio_max"] <= 1.1
        fractions.append(float(metrics["spi/step_fraction"]))
    assert 0 < min(fractions) < 1
