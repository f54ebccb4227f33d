"""Replay: what comes back is what was stored, in order; V-trace and the off-policy ratio against numbers by hand."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import deep_spi
import dream_spi
from envs.protocol import EpisodeStats
from envs.registry import make_pool
from tests.probes import CueEnv
from tests.test_algorithms import column, tiny, tiny_batch
from tests.utils.dreams.test_dreams import dream_setup
from utils.dreams import replay
from utils.dreams.replay import Replayed, vtrace
from utils.runs.flags import UsageError


def plain(shape, num_actions):
    """What the buffer reads of environments whose observations are not stacked."""
    return SimpleNamespace(obs_spec=jax.ShapeDtypeStruct(shape, jnp.uint8), num_actions=num_actions, stacks_frames=False)


class Sizes(NamedTuple):
    """The flags that the buffer reads."""

    num_envs: int
    num_steps: int
    replay_capacity: int
    replay_batch_size: int
    replay_length: int
    use_replay_buffer: bool = True


@settings(max_examples=7, deadline=None)
@given(
    num_envs=st.integers(1, 3), num_steps=st.integers(1, 5), spare=st.integers(0, 7), length=st.integers(1, 4),
    rollouts=st.integers(1, 9), extra=st.integers(0, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_only_stored_contiguous_sequences_come_back(num_envs, num_steps, spare, length, rollouts, extra, seed):
    """Each step is marked by its time and environment. Many are drawn, and all that is held comes back."""
    held = max(length + 1, num_steps) + spare  # steps of each environment
    sizes = Sizes(num_envs, num_steps, held * num_envs + min(extra, num_envs - 1), 1000, length)
    rollouts = max(rollouts, -(-(length + 1) // num_steps))
    env = np.arange(num_envs)[None]
    time = np.arange(rollouts * num_steps + 1)[:, None]
    of = lambda x: np.stack([x[k * num_steps : (k + 1) * num_steps] for k in range(rollouts)])  # noqa: E731
    marks = np.stack(np.broadcast_arrays(time, env), -1)
    steps = deep_spi.Rollout(
        obs=np.concatenate([of(marks), of(marks[1:])[:, -1:]], axis=1).astype(np.uint8),
        value=None,
        action=of(100 * time[:-1] + env).astype(np.int32),
        log_probs=of(np.tile(marks[:-1, :, :1], 3)).astype(np.float32),
        reward=of(time[:-1] + 0.5 * env).astype(np.float32),
        terminated=of((time[:-1] + env) % 3 == 0),
        truncated=of((time[:-1] + env) % 5 == 0),
        valid=of((time[:-1] + env) % 2 == 0),
        episode=None,
        unseen_end=of((time[:-1] + env) % 3 == 0),
    )

    @jax.jit
    def add_all_and_sample(key):  # one program per example: compiling takes most of the time
        buffer = replay.init_replay(plain((2,), 3), sizes)
        buffer, _ = jax.lax.scan(lambda buffer, steps: (replay.add(buffer, steps, sizes), None), buffer, steps)
        return replay.sample(buffer, key, sizes)

    found = jax.device_get(add_all_and_sample(jax.random.key(seed)))
    assert found.obs.shape == (length + 1, 1000, 2) and found.obs.dtype == jnp.uint8
    time, env = np.asarray(found.obs[..., 0], int), np.asarray(found.obs[..., 1], int)
    assert np.all(np.diff(time, axis=0) == 1) and np.all(env == env[:1])
    newest = rollouts * num_steps - 1
    assert set(zip(time.flat, env.flat, strict=True)) == {
        (t, e) for t in range(max(0, newest + 1 - held), newest + 1) for e in range(num_envs)
    }
    # every field of a step has stayed with it
    assert_array_equal(found.action, 100 * time + env)
    assert_array_equal(found.log_probs[..., 2], time)
    assert_array_equal(found.reward, time + 0.5 * env)
    assert_array_equal(found.terminated, (time + env) % 3 == 0)
    assert_array_equal(found.truncated, (time + env) % 5 == 0)
    assert_array_equal(found.valid, (time + env) % 2 == 0)


def test_what_does_not_fit_is_refused_with_a_number_that_does(monkeypatch):
    args = dream_spi.Args(num_envs=8, use_replay_buffer=True)
    env = make_pool("Breakout-v5", 2, 1)
    monkeypatch.setattr(replay, "free_memory", lambda: replay.KEPT_FREE + 2**20)
    with pytest.raises(UsageError, match="--replay-capacity 500000: needs 3.3 GiB .* use 144 or less"):
        replay.check_memory(env, args)
    replay.check_memory(env, replace(args, replay_capacity=144))
    with pytest.raises(UsageError, match="--replay-capacity 152"):
        replay.check_memory(env, replace(args, replay_capacity=152))
    replay.check_memory(env, replace(args, use_replay_buffer=False))
    monkeypatch.undo()
    monkeypatch.setattr(replay, "free_memory", lambda: replay.KEPT_FREE)
    with pytest.raises(UsageError, match="0.0 GiB are available; free some memory, or use --no-use-replay-buffer"):
        replay.check_memory(env, args)


def noise(seed, num_steps, num_envs, obs_shape=(3,), num_actions=3):
    """As `random_steps`, but drawn by NumPy, so that nothing is compiled."""
    rng, shape = np.random.default_rng(seed), (num_steps, num_envs)
    ends, valid = rng.choice(3, shape, p=(0.7, 0.2, 0.1)), np.ones(shape, bool)
    for t in range(1, num_steps):
        valid[t] = ~((ends[t - 1] > 0) & valid[t - 1])
    policy = np.exp(0.1 * rng.normal(size=(*shape, num_actions)))
    steps = deep_spi.Rollout(
        obs=rng.normal(size=(num_steps + 1, num_envs, *obs_shape)).astype(np.float32),
        value=rng.normal(size=(num_steps + 1, num_envs)).astype(np.float32),
        action=rng.integers(num_actions, size=shape).astype(np.int32),
        log_probs=np.log(policy / policy.sum(-1, keepdims=True)).astype(np.float32),
        reward=np.where(valid, rng.normal(size=shape), 0.0).astype(np.float32),
        terminated=(ends == 1) & valid,
        truncated=(ends == 2) & valid,
        valid=valid,
        episode=EpisodeStats(*np.zeros((len(EpisodeStats._fields), num_envs))),
        unseen_end=np.zeros(shape, bool),
    )
    return jax.tree.map(jnp.asarray, steps)


def replayed(steps):
    """A rollout as it comes back from the buffer."""
    fields = {name: np.asarray(getattr(steps, name)) for name in Replayed._fields if name != "obs"}
    last = {name: jnp.asarray(np.concatenate([x, np.zeros_like(x[:1])])) for name, x in fields.items()}
    return Replayed(obs=steps.obs, **last)


jitted_vtrace = jax.jit(vtrace, static_argnums=(3, 4))


def test_vtrace_by_hand():
    """A step, a lost life, its dummy step, a truncation, its dummy step, a step; gamma 0.5, lambda 0.5."""
    steps = Replayed(
        obs=None,
        action=None,
        log_probs=None,
        reward=column(1.0, 1.0, 0.0, 2.0, 0.0, 3.0, 99.0),
        terminated=column(0, 1, 0, 0, 0, 0, 1, dtype=bool),
        truncated=column(0, 0, 0, 1, 0, 0, 1, dtype=bool),
        valid=column(1, 1, 0, 1, 0, 1, 1, dtype=bool),
        unseen_end=column(0, 0, 0, 0, 0, 0, 0, dtype=bool),
    )
    value = column(1.0, 2.0, 30.0, 4.0, 50.0, 6.0, 8.0)
    weight = column(0.5, 0.2, 1.0, 0.1, 1.0, 0.3, 1.0)
    # errors as in the test of generalized advantages: 1, -1, none, 23, none, 1
    expected = [1 + 0.25 * 0.2 * -1, -1.0, 0.0, 23.0, 0.0, 1.0]
    advantage, target = jitted_vtrace(steps, value, weight, 0.5, 0.5)
    assert_allclose(advantage[:, 0], expected, rtol=1e-6)
    assert_allclose(target[:, 0], [1 + 0.5 * 0.95, 2 - 0.2, 30.0, 4 + 2.3, 50.0, 6.3], rtol=1e-6)


def test_vtrace_is_its_definition():
    """v_s = V(s) + sum_t gamma^(t-s) (prod c) rho_t error_t (Espeholt et al., 2018, equation 1); its policy gradient has the
    advantage rho (r + gamma v - V)."""
    steps = replayed(noise(0, 7, 4))
    false = np.zeros((8, 4), bool)
    steps = steps._replace(terminated=jnp.asarray(false), truncated=jnp.asarray(false), valid=jnp.asarray(~false))
    rng = np.random.default_rng(1)
    value = rng.normal(size=(8, 4)).astype(np.float32)
    weight = np.minimum(np.exp(rng.normal(size=(8, 4))), 1.0).astype(np.float32)
    reward = np.asarray(steps.reward)
    error = reward[:-1] + 0.9 * value[1:] - value[:-1]
    expected = [
        value[s] + sum(0.9 ** (t - s) * np.prod(weight[s:t], axis=0) * weight[t] * error[t] for t in range(s, 7))
        for s in range(8)
    ]
    advantage, target = jitted_vtrace(steps, value, weight, 0.9, 1.0)
    assert_allclose(target, np.stack(expected[:-1]), rtol=1e-4, atol=1e-5)
    expected = [reward[s] + 0.9 * expected[s + 1] - value[s] for s in range(7)]
    assert_allclose(advantage, np.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gae_lambda", [1.0, 0.95])
def test_vtrace_on_policy_is_gae(gae_lambda):
    steps = noise(3, 9, 5)
    advantage, target = jitted_vtrace(replayed(steps), steps.value, jnp.ones((10, 5)), 0.99, gae_lambda)
    expected = np.asarray(jax.jit(deep_spi.compute_gae, static_argnums=(1, 2))(steps, 0.99, gae_lambda))
    assert_array_equal(advantage, expected)
    assert_array_equal(target, np.asarray(steps.value)[:-1] + expected)


def test_off_policy_ratio_by_hand():
    """Weights w are the ratios pi_k/mu before the update; pi/pi_k of the first action is 1.25 since, and clipped to 1.2."""
    agent, params, args = tiny(deep_spi, transition_loss_coef=0.0, reward_loss_coef=0.0)
    key = jax.random.key(0)
    for weight, first in ((1.0, 1.2), (0.1, 0.12), (0.5, 0.6), (2.0, 2.4)):
        of = jnp.array([weight, 1.0, 1.0])
        _, metrics = deep_spi.loss_fn(params, tiny_batch(deep_spi), key, agent, args, weight=of)
        assert_allclose(metrics["losses/policy_loss"], (-2 * first + 1.0) / 2, rtol=1e-5)
        assert_allclose(metrics["losses/clipfrac"], 0.5)  # whatever the weight
        # how far the policy has moved has nothing to do with mu
        assert_allclose([metrics["spi/ratio_max"], metrics["spi/ratio_min"]], [1.25, 0.5 / 0.6], rtol=1e-5)
        assert_allclose(metrics["losses/approx_kl"], weight * (0.25 - np.log(1.25)) / 2, rtol=1e-4)
    # where the action is bad, what has fallen too far is held: pi/pi_k = 0.5 / 0.8, clipped to 0.8, times w = 2
    batch = tiny_batch(deep_spi)
    batch = batch._replace(advantage=jnp.array([-2.0, -1.0, 9.0]), log_probs=batch.log_probs.at[0].set(jnp.log(0.8)))
    _, metrics = deep_spi.loss_fn(params, batch, key, agent, args, weight=jnp.array([2.0, 1.0, 1.0]))
    assert_allclose(metrics["losses/policy_loss"], (2 * 1.6 + 1.0) / 2, rtol=1e-5)


@jax.jit
def loss_at_one_step(weight, moved, utility):
    """The loss of a policy that has moved since the update began, and its slope in the actor's parameter."""
    agent, params, args = tiny(deep_spi, transition_loss_coef=0.0, reward_loss_coef=0.0, ent_coef=0.0, vf_coef=0.0)
    batch = tiny_batch(deep_spi)
    batch = batch._replace(
        advantage=jnp.zeros(3).at[0].set(utility), log_probs=batch.log_probs.at[0, 0].set(jnp.log(0.5 / moved))
    )
    batch = batch._replace(obs=batch.obs.at[0, ..., 0].set(0.1))  # where the actor's parameter has a gradient
    weight, key = jnp.ones(3).at[0].set(weight), jax.random.key(0)
    loss = lambda params: deep_spi.loss_fn(params, batch, key, agent, args, weight=weight)[0]  # noqa: E731
    value, grads = jax.value_and_grad(loss)(params)
    return value, grads.actor_critic["params"]["w"]


@settings(max_examples=30, deadline=None)
@given(weight=st.floats(0.01, 20), moved=st.floats(0.2, 3), utility=st.floats(-3, 3))
def test_the_neighborhood_is_about_the_policy_before_the_update_whatever_the_weight(weight, moved, utility):
    """A gradient moves the policy out of [1 - eps, 1 + eps] of pi_k for no weight, and the loss is w times that of PPO."""
    value, slope = loss_at_one_step(weight, moved, utility)
    pi = 1 / (1 + np.exp(-0.1))
    moved = moved * pi / 0.5
    assert_allclose(value, weight * max(-utility * moved, -utility * np.clip(moved, 0.8, 1.2)) / 2, rtol=1e-4, atol=1e-6)
    if (utility > 0 and moved > 1.2001) or (utility < 0 and moved < 0.7999):
        assert slope == 0
    elif abs(utility) > 0.01 and 0.8001 < moved < 1.1999:
        assert slope != 0


@pytest.mark.parametrize("off_policy", ["vtrace", pytest.param("clipped_ratio", marks=pytest.mark.slow)])
def test_on_policy_replay_is_deep_spi_on_the_rollout(off_policy):
    """The loss, and all its gradients, of a rollout that comes back before anything was learned."""
    args, env, agent, _, state = dream_setup(gae_lambda=1.0, num_minibatches=1, transition_loss_coef=1.0, reward_loss_coef=1.0)
    args = replace(args, off_policy=off_policy)

    @jax.jit
    def play(state):
        _, steps = deep_spi.rollout(state, env, agent, args)
        advantages = deep_spi.compute_gae(steps, args.gamma, 1.0)
        return steps, deep_spi.gather(steps, advantages, jnp.zeros(16, jnp.int32), jnp.arange(16), args)

    @jax.jit
    def learn(params, fresh, again):
        fields, ended, weight = replay.for_policy(params, again, agent, args)
        batch = dream_spi.Minibatch(**fields)
        loss = partial(deep_spi.loss_fn, key=jax.random.key(1), agent=agent, args=args)
        grads = jax.value_and_grad(loss, has_aux=True)
        return batch, ended, weight, grads(params, fresh), grads(params, batch, weight=weight)

    steps, fresh = play(state)
    batch, ended, weight, ((expected, _), of_fresh), ((found, _), of_replayed) = learn(state.params, fresh, replayed(steps))
    assert_array_equal(ended, steps.terminated.reshape(-1))
    assert_allclose(weight, 1.0, rtol=1e-5)
    for name in fresh._fields:
        assert_allclose(getattr(batch, name), getattr(fresh, name), atol=1e-5, err_msg=name)
    assert_allclose(found, expected, rtol=1e-5)
    close = lambda a, b: assert_allclose(a, b, atol=1e-4 * np.max(np.abs(b)) + 1e-9)  # noqa: E731
    jax.tree.map(close, of_replayed, of_fresh)


@pytest.mark.parametrize("off_policy, most", [("vtrace", 1.0), ("vtrace", 1.03), ("clipped_ratio", 1.0)])
def test_what_an_older_policy_did_is_weighed(off_policy, most):
    """A policy that has moved since: log-probabilities are those of the present policy, weights its ratios to the older one,
    and what a masked step holds changes nothing."""
    args, _, agent, _, state = dream_setup()
    args = replace(args, off_policy=off_policy, vtrace_max_weight=most)
    stored = replayed(noise(5, 6, 4))
    params = jax.tree.map(lambda x: 5 * x, jax.device_get(state.params))  # the actor's output layer starts near 0
    masked = ~np.asarray(stored.valid)
    assert masked[:-1].any()
    other = stored._replace(
        action=jnp.asarray(np.where(masked, 2 - stored.action, stored.action)),
        reward=jnp.asarray(np.where(masked, np.float32(1e3), stored.reward)),
        log_probs=jnp.asarray(np.where(masked[..., None], np.float32(-50.0), stored.log_probs)),
    )

    @jax.jit
    def weigh(params, stored):
        fields, _, weight = replay.for_policy(params, stored, agent, args)
        batch = dream_spi.Minibatch(**fields)
        logits, value = agent.actor_critic.apply(params.actor_critic, agent.encoder.apply(params.encoder, fields["obs"]))
        loss, _ = deep_spi.loss_fn(params, batch, jax.random.key(1), agent, args, weight=weight)
        return batch, weight, jax.nn.log_softmax(logits).reshape(7, 4, 3), value.reshape(7, 4), loss

    batch, weight, log_probs, value, loss = weigh(params, stored)
    taken = np.take_along_axis(np.asarray(log_probs - stored.log_probs), np.asarray(stored.action)[..., None], -1)
    ratio = np.where(stored.valid, np.exp(taken[..., 0]), 1.0)
    assert ratio[:-1].max() > 1.05 and ratio[:-1].min() < 0.95
    truncated = np.minimum(ratio, most)
    assert_allclose(batch.log_probs, log_probs[:-1].reshape(-1, 3), rtol=1e-5)
    assert_allclose(weight, (truncated if off_policy == "vtrace" else ratio)[:-1].reshape(-1), rtol=1e-4)
    advantage, target = jitted_vtrace(stored, value, jnp.asarray(truncated), args.gamma, args.gae_lambda)
    assert_allclose(batch.advantage, advantage.reshape(-1), rtol=1e-4, atol=1e-5)
    assert_allclose(batch.target, target.reshape(-1), rtol=1e-4, atol=1e-5)
    assert weigh(params, other)[-1] == loss


def test_a_buffer_that_outlived_its_games_marks_the_last_step_of_each_as_none():
    """Three rollouts of two steps in a buffer of five: whether it has wrapped around or not."""
    sizes = Sizes(num_envs=2, num_steps=2, replay_capacity=10, replay_batch_size=4, replay_length=1)
    buffer = replay.init_replay(plain((3,), 4), sizes)
    emulators, in_jax = make_pool("CartPole-v1", 2, 1), CueEnv(2)
    add = jax.jit(partial(replay.add, args=sizes))
    for k in range(3):
        steps = noise(k, 2, 2, num_actions=4)
        steps = steps._replace(obs=steps.obs.astype(jnp.uint8), valid=jnp.ones((2, 2), bool))
        buffer = add(buffer, steps)
        args = SimpleNamespace(use_replay_buffer=True, save_replay=True)
        state = SimpleNamespace(replay=buffer, _replace=lambda replay: SimpleNamespace(replay=replay))
        marked = replay.refill(state, print, 1, emulators, args).replay
        newly = np.asarray(buffer.experience.valid) & ~np.asarray(marked.experience.valid)
        assert_array_equal(newly, [np.arange(5) == (2 * k + 1) % 5] * 2)
        assert replay.refill(state, print, 1, in_jax, args) is state
        assert replay.refill(state, print, 0, emulators, args) is state
