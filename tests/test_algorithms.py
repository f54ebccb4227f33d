"""Advantages, losses and updates of the scripts against numbers computed by hand, and against each other."""

import ast
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import deep_mdp_ppo as deep_mdp
import deep_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from envs.protocol import EpisodeStats
from envs.registry import make_pool
from tests.probes import CueEnv, PixelCueEnv, make_iteration, random_steps, state_without_env
from utils.distributions import Deterministic
from utils.runs.flags import check_flags

SCRIPTS = [ppo, deep_spi]
ROOT = Path(deep_spi.__file__).parent


FRAMES, VECTORS = (4, 84, 84), (5,)  # shapes of observations; programs without convolutions compile faster


def column(*values, dtype=jnp.float32):
    return jnp.asarray(values, dtype)[:, None]


def test_gae_by_hand():
    """A step, a lost life, its dummy step, a truncation, its dummy step, a step; gamma 0.5, lambda 0.5."""
    steps = ppo.Rollout(
        obs=jnp.zeros((7, 1, 1)),
        value=column(1.0, 2.0, 30.0, 4.0, 50.0, 6.0, 8.0),
        action=None,
        log_probs=None,
        reward=column(1.0, 1.0, 0.0, 2.0, 0.0, 3.0),
        terminated=column(0, 1, 0, 0, 0, 0, dtype=bool),
        truncated=column(0, 0, 0, 1, 0, 0, dtype=bool),
        valid=column(1, 1, 0, 1, 0, 1, dtype=bool),
        episode=None,
        unseen_end=column(0, 0, 0, 0, 0, 0, dtype=bool),
    )
    # t=5: 3 + 0.5*8 - 6 = 1.   t=4: dummy.   t=3: truncated, bootstraps from its last observation: 2 + 0.5*50 - 4 = 23.
    # t=2: dummy.   t=1: terminated: 1 - 2 = -1.   t=0: 1 + 0.5*2 - 1 = 1, and 0.25 * (-1) of what follows.
    expected = [0.75, -1.0, 0.0, 23.0, 0.0, 1.0]
    for script in (*SCRIPTS, deep_mdp):
        assert_allclose(script.compute_gae(steps, 0.5, 0.5)[:, 0], expected, rtol=1e-6)


def test_gae_without_ends_is_the_discounted_sum_of_errors():
    key = jax.random.key(0)
    steps = random_steps(ppo, key, 6, 3)
    false = jnp.zeros_like(steps.valid)
    steps = steps._replace(terminated=false, truncated=false, valid=~false)
    reward, value = np.asarray(steps.reward), np.asarray(steps.value)
    delta = reward + 0.9 * value[1:] - value[:-1]
    slow = [sum((0.9 * 0.8) ** k * delta[t + k] for k in range(6 - t)) for t in range(6)]
    assert_allclose(ppo.compute_gae(steps, 0.9, 0.8), np.stack(slow), rtol=1e-5)


class Identity(nn.Module):
    """Encoder: the observation is the latent."""

    def __call__(self, obs):
        return obs


class FirstChannels(nn.Module):
    """Actor-critic: logits w * z_0 and 0, value z_1."""

    @nn.compact
    def __call__(self, z, obs=None):
        w = self.param("w", nn.initializers.ones, ())
        z = z.reshape(z.shape[0], -1)
        return jnp.stack([w * z[:, 0], jnp.zeros_like(z[:, 0])], 1), z[:, 1]


class Shift(nn.Module):
    """Transition: z' = z + b."""

    @nn.compact
    def __call__(self, z, action):
        return Deterministic(z + self.param("b", nn.initializers.zeros, ()))


class ConstantReward(nn.Module):
    """Reward: c."""

    @nn.compact
    def __call__(self, z, action):
        return self.param("c", nn.initializers.zeros, ()) + 0.0 * action


def tiny_batch(script):
    """Three transitions, the last one masked. Latents have two numbers, the logit and the value."""
    obs = jnp.array([[0.0, 0.5], [np.log(3.0), 0.0], [1.0, 1.0], [0.5, 0.5], [np.log(3.0), 2.0], [7.0, 7.0]])
    return script.Minibatch(
        obs=obs[:, None, None, :],
        action=jnp.array([0, 1, 0]),
        log_probs=jnp.log(jnp.array([[0.4, 0.6], [0.75, 0.25], [0.1, 0.9]])),
        value=jnp.array([0.4, 0.0, 3.0]),
        advantage=jnp.array([2.0, -1.0, 9.0]),
        target=jnp.array([1.0, -1.0, 9.0]),
        reward=jnp.array([0.5, 2.0, 9.0]),
        valid=jnp.array([True, True, False]),
        unseen_end=jnp.zeros(3, bool),
    )


def tiny(script, **flags):
    args = script.Args(norm_adv=False, clip_coef=0.2, **flags)
    modules = [Identity(), FirstChannels(), Shift(), ConstantReward()][: len(script.Agent._fields)]
    values = [{}, {"params": {"w": 1.0}}, {"params": {"b": 0.0}}, {"params": {"c": 0.0}}][: len(modules)]
    return script.Agent(*modules), script.Params(*values), args


def test_ppo_loss_by_hand():
    agent, params, args = tiny(ppo)
    loss, metrics = ppo.loss_fn(params, tiny_batch(ppo), jax.random.key(0), agent, args)
    # pi(0) is 1/2, then 3/4; ratios 0.5/0.4 = 1.25, clipped to 1.2, and 0.25/0.25 = 1
    policy_loss = (max(-2 * 1.25, -2 * 1.2) + 1.0) / 2
    # values 0.5 and 0, targets 1 and -1; the old ones 0.4 and 0, so nothing is clipped
    value_loss = 0.5 * (0.5**2 + 1.0) / 2
    entropy = (np.log(2) - (0.75 * np.log(0.75) + 0.25 * np.log(0.25))) / 2
    assert_allclose(metrics["losses/policy_loss"], policy_loss, rtol=1e-5)
    assert_allclose(metrics["losses/value_loss"], value_loss, rtol=1e-5)
    assert_allclose(metrics["losses/entropy"], entropy, rtol=1e-5)
    assert_allclose(metrics["losses/clipfrac"], 0.5)
    # of all actions: 0.5/0.4 and 0.5/0.6, then 0.75/0.75 and 0.25/0.25
    assert_allclose([metrics["spi/ratio_max"], metrics["spi/ratio_min"]], [1.25, 0.5 / 0.6], rtol=1e-5)
    assert_allclose(metrics["spi/outside_fraction"], 0.5)
    assert_allclose(metrics["losses/approx_kl"], (0.25 - np.log(1.25)) / 2, rtol=1e-4)
    assert_allclose(loss, policy_loss - 0.01 * entropy + 0.5 * value_loss, rtol=1e-5)


def test_huber_and_clipped_value_by_hand():
    batch = tiny_batch(ppo)._replace(value=jnp.array([0.0, 0.0, 0.0]), target=jnp.array([3.0, 0.1, 0.0]))
    # first: value 0.5, clipped to 0.2: errors -2.5 and -2.8, the larger loss is 2.8 - 0.5.  second: 0 - 0.1
    # by default nothing is clipped, and the square is of -2.5
    for flags, first in (
        ({"use_huber": True, "clip_vloss": True}, 2.3),
        ({"use_huber": True}, 2.0),
        ({"clip_vloss": True}, 0.5 * 2.8**2),
        ({}, 0.5 * 2.5**2),
    ):
        agent, params, args = tiny(ppo, **flags)
        _, metrics = ppo.loss_fn(params, batch, jax.random.key(0), agent, args)
        assert_allclose(metrics["losses/value_loss"], (first + 0.5 * 0.01) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    "script, flags",
    [(ppo, {}), (ppo, {"decoupled_layers": True}), (ppo, {"decoupled_repr": True}), (deep_spi, {"decoupled_repr": True})],
)  # Deep SPI with codes, which compile faster
def test_what_actor_and_critic_share(script, flags):
    """By the gradients of the value loss alone, and of the policy loss alone."""
    codes = {} if script is ppo else {"latent": "categorical", "num_categories": 4, "num_classes": 4}
    args = script.Args(num_envs=4, num_steps=4, num_minibatches=2, fc_layers=(16,), ent_coef=0.0, **codes, **flags)
    check_flags(args)
    agent = script.make_agent(args, 3)
    steps = random_steps(script, jax.random.key(1), 4, 4, obs_shape=(5,), num_actions=3)
    params = jax.jit(script.init_params, static_argnums=1)(jax.random.key(0), agent, steps.obs[0])
    first, env = script.minibatch_indices(jax.random.key(2), args)
    batch = script.gather(steps, script.compute_gae(steps, 0.99, 0.95), first[0], env[0], args)

    quiet = {} if script is ppo else {"transition_loss_coef": 0.0, "reward_loss_coef": 0.0}

    @jax.jit
    def gradients(params, vf_coef, advantage):
        of = replace(args, vf_coef=vf_coef, norm_adv=False, **quiet)
        loss = lambda p: script.loss_fn(p, batch._replace(advantage=advantage), jax.random.key(3), agent, of)[0]  # noqa: E731
        return jax.grad(loss)(params)

    def learned(vf_coef, advantage):
        grads = gradients(params, vf_coef, advantage)
        parts = {"encoder": grads.encoder} | grads.actor_critic["params"]
        return {name for name, tree in parts.items() if any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(tree))}

    of_critic = learned(1.0, jnp.zeros_like(batch.advantage))
    of_actor = learned(0.0, batch.advantage)
    assert of_actor == {"encoder", "hidden", "actor"}
    assert (
        of_critic
        == {
            "": {"encoder", "hidden", "critic"},
            "decoupled_layers": {"encoder", "critic_hidden", "critic"},
            "decoupled_repr": {"own_encoder", "critic_hidden", "critic"},
        }["".join(flags)]
    )


def test_deep_spi_loss_by_hand():
    agent, params, args = tiny(deep_spi, transition_loss_coef=0.5, reward_loss_coef=2.0)
    loss, metrics = deep_spi.loss_fn(params, tiny_batch(deep_spi), jax.random.key(0), agent, args)
    # next latents (0.5, 0.5) and (log 3, 2); errors (0.5, 0) and (0, 2): Huber 0.125 and 1.5
    transition, reward = [0.125, 1.5], [0.5 * 0.5**2, 1.5]
    utility = [2.0 - 2.0 * reward[0] - 0.5 * transition[0], -1.0 - 2.0 * reward[1] - 0.5 * transition[1]]
    policy_loss = (max(-utility[0] * 1.25, -utility[0] * 1.2) - utility[1]) / 2
    assert_allclose(metrics["losses/transition_loss"], np.mean(transition), rtol=1e-5)
    assert_allclose(metrics["losses/reward_loss"], np.mean(reward), rtol=1e-5)
    assert_allclose(metrics["losses/policy_loss"], policy_loss, rtol=1e-5)

    # the losses' means in every utility
    args = replace(args, piecewise_auxiliary_ratio=False)
    _, metrics = deep_spi.loss_fn(params, tiny_batch(deep_spi), jax.random.key(0), agent, args)
    penalty = 2.0 * np.mean(reward) + 0.5 * np.mean(transition)
    utility = [2.0 - penalty, -1.0 - penalty]
    assert_allclose(
        metrics["losses/policy_loss"], (-utility[0] * (1.2 if utility[0] > 0 else 1.25) - utility[1]) / 2, rtol=1e-5
    )


@pytest.mark.parametrize("script", [deep_spi, deep_mdp])
def test_an_unseen_terminal_observation_is_in_no_loss(script):
    """The second transition ends an episode, and its next observation is the first one of the next episode: its transition loss
    is masked, its reward, advantage and value are not."""
    flags = {"transition_loss_coef": 0.5, "reward_loss_coef": 2.0}
    agent, params, args = tiny(script, **flags)
    batch = tiny_batch(script)._replace(unseen_end=jnp.array([False, True, False]))
    loss, metrics = script.loss_fn(params, batch, jax.random.key(0), agent, args)
    transition, reward = [0.125, 0.0], [0.125, 1.5]  # as above, but for the second transition
    assert_allclose([metrics["losses/transition_loss"], metrics["losses/reward_loss"]], [0.125, 0.8125], rtol=1e-5)
    if script is deep_spi:
        utility = [2.0 - 2.0 * reward[0] - 0.5 * transition[0], -1.0 - 2.0 * reward[1]]
        assert_allclose(metrics["losses/policy_loss"], (-utility[0] * 1.2 - utility[1]) / 2, rtol=1e-5)
    other = batch._replace(obs=batch.obs.at[4].set(-5.0))  # that next observation
    gradient = lambda batch: jax.grad(script.loss_fn, has_aux=True)(params, batch, jax.random.key(0), agent, args)[0]  # noqa: E731
    for a, b in zip(*(jax.tree.leaves(gradient(x)) for x in (batch, other)), strict=True):
        assert_array_equal(a, b)


def test_gae_where_ends_are_unseen():
    """A termination, the next episode's first steps, and a truncation, which is no transition: the step before it bootstraps
    from the value of the state that was cut off. Gamma 0.5, lambda 0.5."""
    steps = ppo.Rollout(
        obs=jnp.zeros((5, 1, 1)),
        value=column(1.0, 2.0, 4.0, 6.0, 80.0),
        action=None,
        log_probs=None,
        reward=column(1.0, 3.0, 2.0, 9.0),
        terminated=column(1, 0, 0, 0, dtype=bool),
        truncated=column(0, 0, 0, 1, dtype=bool),
        valid=column(1, 1, 1, 0, dtype=bool),
        episode=None,
        unseen_end=column(1, 0, 0, 1, dtype=bool),
    )
    # t=3: no transition.   t=2: 2 + 0.5*6 - 4 = 1.   t=1: 3 + 0.5*4 - 2 = 3, and 0.25 * 1.   t=0: 1 - 1, nothing of t=1
    assert_allclose(ppo.compute_gae(steps, 0.5, 0.5)[:, 0], [0.0, 3.25, 1.0, 0.0], rtol=1e-6)


def test_deep_mdp_loss_by_hand():
    flags = {"transition_loss_coef": 0.5, "reward_loss_coef": 2.0}
    agent, params, args = tiny(deep_mdp, **flags)
    loss, metrics = deep_mdp.loss_fn(params, tiny_batch(deep_mdp), jax.random.key(0), agent, args)
    agent, params, args = tiny(ppo)
    without, _ = ppo.loss_fn(params, tiny_batch(ppo), jax.random.key(0), agent, args)
    # the losses of Deep SPI's test above: means 0.8125 and 0.8125
    assert_allclose([metrics["losses/transition_loss"], metrics["losses/reward_loss"]], [0.8125, 0.8125], rtol=1e-6)
    assert_allclose(loss - without, 0.5 * 0.8125 + 2.0 * 0.8125, rtol=1e-5)


@pytest.mark.parametrize("script", [deep_mdp, deep_spi])
def test_gradient_penalty_is_added_to_the_loss_by_hand(script):
    """z' = z + b has slope 1 in every direction, a constant reward slope 0; the masked transition does not count."""
    losses = {}
    for lambda_gp in (0.0, 0.5):
        flags = {"lipschitz_nets": False, "transition_density": "deterministic", "lambda_gp": lambda_gp}
        agent, params, args = tiny(script, **flags)
        losses[lambda_gp], metrics = script.loss_fn(params, tiny_batch(script), jax.random.key(0), agent, args)
    assert_allclose(losses[0.5] - losses[0.0], 0.5, rtol=1e-5)
    assert_allclose(metrics["losses/gradient_penalty"], 1.0, rtol=1e-5)


def test_drift_with_coefficient_one_is_the_clipped_loss():
    agent, params, args = tiny(deep_spi)
    batch, key = tiny_batch(deep_spi), jax.random.key(0)
    clipped = deep_spi.loss_fn(params, batch, key, agent, args)[0]
    drift = replace(args, drift_formulation=True)
    assert_allclose(deep_spi.loss_fn(params, batch, key, agent, drift)[0], clipped, rtol=1e-6)
    # ratio 1.25, clipped 1.2: half the drift is paid back
    half = deep_spi.loss_fn(params, batch, key, agent, replace(drift, drift_coef=0.5))[0]
    utility = 2.0 - args.reward_loss_coef * 0.125 - args.transition_loss_coef * 0.125
    assert_allclose(half - clipped, -0.5 * 0.05 * utility / 2, rtol=1e-3)


@pytest.mark.parametrize(
    "script, shape, flags",
    [
        (ppo, FRAMES, {"minibatch_by": "transition"}),
        (deep_spi, VECTORS, {}),
        pytest.param(ppo, VECTORS, {}, marks=pytest.mark.slow),
        pytest.param(deep_spi, FRAMES, {"minibatch_by": "transition", "latent": "categorical"}, marks=pytest.mark.slow),
        pytest.param(deep_mdp, FRAMES, {"lipschitz_nets": False}, marks=pytest.mark.slow),
    ],
)
def test_masked_steps_change_no_loss_and_no_gradient_by_one_bit(script, shape, flags):
    args = script.Args(num_envs=4, num_steps=6, num_minibatches=2, fc_layers=(16,), **flags)
    agent = script.make_agent(args, 4)
    steps = random_steps(script, jax.random.key(1), 6, 4, shape)
    assert not steps.valid.all()
    params = jax.jit(script.init_params, static_argnums=1)(jax.random.key(0), agent, steps.obs[0])
    first, env = script.minibatch_indices(jax.random.key(2), args)

    @jax.jit
    def loss(params, steps):
        advantages = script.compute_gae(steps, 0.99, 0.95)
        batch = script.gather(steps, advantages, first[0], env[0], args)
        return jax.value_and_grad(script.loss_fn, has_aux=True)(params, batch, jax.random.key(3), agent, args)

    noise = random_steps(script, jax.random.key(9), 6, 4, shape)
    masked = ~steps.valid
    other = steps._replace(
        action=jnp.where(masked, noise.action, steps.action),
        log_probs=jnp.where(masked[..., None], -99.0, steps.log_probs),
        reward=jnp.where(masked, 1e6, steps.reward),
    )
    for a, b in zip(jax.tree.leaves(loss(params, steps)), jax.tree.leaves(loss(params, other)), strict=True):
        assert_array_equal(a, b)


@pytest.mark.parametrize("minibatch_by", ["transition", "env"])
def test_minibatches_cover_each_transition_once_and_pair_it_with_what_followed(minibatch_by):
    args = ppo.Args(num_envs=6, num_steps=4, num_minibatches=3, update_epochs=2, minibatch_by=minibatch_by)
    steps = random_steps(ppo, jax.random.key(1), 4, 6, obs_shape=())
    steps = steps._replace(obs=jnp.arange(5 * 6).reshape(5, 6), action=jnp.arange(4 * 6).reshape(4, 6), value=jnp.zeros((5, 6)))
    first, env = ppo.minibatch_indices(jax.random.key(0), args)
    gather = jax.jit(partial(ppo.gather, args=args))
    for epoch in range(2):
        seen = []
        for k in range(3 * epoch, 3 * epoch + 3):
            batch = gather(steps, jnp.zeros((4, 6)), first[k], env[k])
            n = batch.action.shape[0]
            assert_array_equal(batch.obs[:n], batch.action)
            assert_array_equal(batch.obs[-n:], batch.action + 6)
            seen.append(batch.action)
        assert_array_equal(np.sort(np.concatenate(seen)), np.arange(24))


def script_setup(script, shape=VECTORS, **flags):
    args = script.Args(num_envs=4, num_steps=4, num_minibatches=2, total_timesteps=16 * 10, fc_layers=(16,), **flags)
    agent, optimizer = script.make_agent(args, 4), script.make_optimizer(args)
    steps = random_steps(script, jax.random.key(1), 4, 4, shape)
    params = jax.jit(script.init_params, static_argnums=1)(jax.random.key(0), agent, steps.obs[0])
    return args, agent, optimizer, steps, params


def first_minibatch(script, **flags):
    """The jitted loss with its gradients, and what it takes: parameters and the first minibatch of a rollout of noise."""
    args, agent, _, steps, params = script_setup(script, **flags)
    first, env = script.minibatch_indices(jax.random.key(2), args)
    batch = script.gather(steps, script.compute_gae(steps, 0.99, 0.95), first[0], env[0], args)
    loss = jax.jit(lambda p, b: jax.value_and_grad(script.loss_fn, has_aux=True)(p, b, jax.random.key(3), agent, args))
    return loss, params, batch, agent


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert_array_equal(x, y)


@pytest.mark.parametrize(
    "latent, shape",
    [
        ("continuous", VECTORS),
        pytest.param("continuous", FRAMES, marks=pytest.mark.slow),
        pytest.param("categorical", FRAMES, marks=pytest.mark.slow),
    ],
)
def test_with_zero_coefficients_all_are_ppo(latent, shape):
    flags = {"latent": latent, "num_categories": 8, "num_classes": 8} if latent == "categorical" else {}
    model = {"transition_density": "deterministic"} if shape == VECTORS else {}  # compiles faster
    results = []
    for script in (ppo, deep_mdp, deep_spi):
        coefs = {} if script is ppo else {"transition_loss_coef": 0.0, "reward_loss_coef": 0.0, **model}
        loss, params, batch, _ = first_minibatch(script, shape=shape, **flags, **coefs)
        (value, _), grads = loss(params, batch)
        results.append((params, value, grads))
    (params, value, grads), *results = results
    assert_same_bits(*results)
    for their_params, their_value, their_grads in results:
        assert_same_bits((params.encoder, params.actor_critic), (their_params.encoder, their_params.actor_critic))
        assert_same_bits((value, grads.actor_critic), (their_value, their_grads.actor_critic))
        assert all(not g.any() for g in jax.tree.leaves((their_grads.transition, their_grads.reward)))
        # the sums over frames have as many terms again, all 0, for the frames that only the world model sees
        for a, b in zip(jax.tree.leaves(grads.encoder), jax.tree.leaves(their_grads.encoder), strict=True):
            assert_allclose(a, b, atol=2e-6 * float(jnp.abs(a).max()))


def test_gradients_of_the_world_model_are_those_of_deep_mdp_times_the_ratio():
    theirs, params, batch, agent = first_minibatch(deep_mdp)
    ours, *_ = first_minibatch(deep_spi)
    z = agent.encoder.apply(params.encoder, batch.obs[: len(batch.action)])
    logits, _ = agent.actor_critic.apply(params.actor_critic, z)
    log_probs = jax.nn.log_softmax(logits)
    for ratio in (1.0, 1.05):
        old = batch._replace(log_probs=log_probs - np.log(ratio))
        theirs_grads, ours_grads = theirs(params, old)[1], ours(params, old)[1]
        for name in ("transition", "reward"):
            for a, b in zip(*(jax.tree.leaves(getattr(g, name)) for g in (theirs_grads, ours_grads)), strict=True):
                assert float(jnp.abs(a).max()) > 0
                # those of what is shifted start near 0, as differences of larger numbers
                assert_allclose(ratio * a, b, atol=1e-3 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("script", [pytest.param(deep_mdp, marks=pytest.mark.slow), deep_spi])
def test_the_gradient_of_the_world_model_in_the_encoder_is_scaled(script):
    """It is linear in --encoder-gradient, and nothing else changes."""
    flags = {"transition_density": "deterministic", "transition_loss_coef": 1.0, "reward_loss_coef": 1.0}
    (none, half, whole) = ((loss(params, batch)[1]) for loss, params, batch, _ in (
        first_minibatch(script, shape=VECTORS, encoder_gradient=factor, **flags) for factor in (0.0, 0.5, 1.0)
    ))  # fmt: skip
    for grads in (none, half):
        assert_same_bits(grads._replace(encoder=None), whole._replace(encoder=None))
    for a, b, c in zip(*(jax.tree.leaves(grads.encoder) for grads in (none, half, whole)), strict=True):
        assert float(jnp.abs(a - c).max()) > 0.01 * float(jnp.abs(c).max())
        assert_allclose(b, (a + c) / 2, atol=1e-6 * float(jnp.abs(c).max()))


@pytest.mark.parametrize(
    "density, lipschitz, shape",
    [
        ("mixture_normal", True, VECTORS),
        pytest.param("mixture_normal", True, FRAMES, marks=pytest.mark.slow),
        pytest.param("mixture_normal", False, FRAMES, marks=pytest.mark.slow),
        pytest.param("normal", True, FRAMES, marks=pytest.mark.slow),
        pytest.param("deterministic", False, FRAMES, marks=pytest.mark.slow),
    ],
)
def test_gradient_reaches_all_networks_through_the_utility(density, lipschitz, shape):
    # without entropy and value loss, and at ratio 1, all gradient comes through the utility and the policy
    args, agent, optimizer, steps, params = script_setup(
        deep_spi, shape, transition_density=density, lipschitz_nets=lipschitz, ent_coef=0.0, vf_coef=0.0
    )
    first, env = deep_spi.minibatch_indices(jax.random.key(2), args)
    batch = deep_spi.gather(steps, jnp.zeros((4, 4)), first[0], env[0], args)  # no advantage: nothing but the world model
    grad = jax.jit(lambda p: jax.grad(deep_spi.loss_fn, has_aux=True)(p, batch, jax.random.key(3), agent, args)[0])
    grads = grad(params)
    for name in ("encoder", "transition", "reward"):
        leaves = jax.tree.leaves(getattr(grads, name))
        assert all(bool(jnp.isfinite(g).all()) for g in leaves)
        assert sum(float(jnp.abs(g).sum()) for g in leaves) > 0, name
        kernels = [g for g in leaves if g.ndim > 1]
        assert all(float(jnp.abs(g).max()) > 0 for g in kernels), name


def test_target_kl_stops_the_update_and_annealing_ends_at_zero():
    for flags in ({"target_kl": 1e-12}, {"target_kl": 1e9}, {}):
        args, agent, optimizer, steps, params = script_setup(ppo, **flags)
        state = state_without_env(ppo, params, optimizer)
        advantages = ppo.compute_gae(steps, 0.99, 0.95)
        update = jax.jit(partial(ppo.update, agent=agent, optimizer=optimizer, args=args))
        after, metrics = update(state, steps, advantages, jax.random.key(1))
        count = int(after.opt_state[1].count)
        assert count == (1 if flags.get("target_kl") == 1e-12 else 8), flags
        assert all(bool(jnp.isfinite(v)) for v in metrics.values()), metrics
        assert_allclose(metrics["charts/learning_rate"], args.learning_rate)
    _, metrics = update(state._replace(iteration=jnp.asarray(5)), steps, advantages, jax.random.key(1))
    assert_allclose(metrics["charts/learning_rate"], 0.5 * args.learning_rate)


def functions(script):
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


ADDED = {"Args", "Agent", "Params", "make_agent", "init_params", "loss_fn", "learn", "main"}


@pytest.mark.parametrize(
    "theirs, ours, may_differ",
    [(ppo, deep_spi, ADDED), (ppo, deep_mdp, ADDED), (deep_mdp, deep_spi, {"Args", "loss_fn", "main"})],
)
def test_what_the_scripts_share_is_the_same(theirs, ours, may_differ):
    """`diff` of two scripts shows their algorithms: other functions are the same in both, and in the same order."""
    a, b = functions(theirs), functions(ours)
    shared = [name for name in a if name in b and name not in may_differ]
    assert shared == [name for name in b if name in a and name not in may_differ], "they are in another order"
    for name in shared:
        assert ast.dump(a[name]) == ast.dump(b[name]), (
            f"{name} differs between {theirs.__name__}.py and {ours.__name__}.py. If both should change, copy the change; "
            "if this is what makes your algorithm another one, name the function in may_differ of this test."
        )


def learn(script, env, args, updates):
    agent, optimizer = script.make_agent(args, env.num_actions, env.obs_parts), script.make_optimizer(args)
    state = script.init_state(args, env, agent, optimizer)
    iteration = make_iteration(script, env, agent, optimizer, args)
    history = []
    for _ in range(updates):
        state, metrics = iteration(state)
        history.append(jax.device_get(metrics))
    return state, history


@pytest.mark.parametrize(
    "script, flags", [(ppo, {"compute_dtype": "bfloat16"}), pytest.param(deep_mdp, {}, marks=pytest.mark.slow), (deep_spi, {})]
)
def test_learns_a_probe_of_known_value(script, flags):
    args = script.Args(num_envs=16, num_steps=8, total_timesteps=128 * 60, learning_rate=2e-3, fc_layers=(64,), **flags)
    env = CueEnv(16)
    state, history = learn(script, env, args, 60)
    assert history[0]["charts/episodic_return"] < 0.7
    assert np.mean([h["charts/episodic_return"] for h in history[-5:]]) > 0.95
    agent = script.make_agent(args, env.num_actions, env.obs_parts)
    obs = env.reset()[1]
    _, value = agent.actor_critic.apply(state.params.actor_critic, agent.encoder.apply(state.params.encoder, obs))
    assert_allclose(value, 1.0, atol=0.15)
    assert history[0]["charts/episodes"] == 16 * 4  # each episode is a step and a dummy step
    assert history[0]["charts/episodic_length"] == 1


@pytest.mark.slow
def test_learns_from_pixels_at_the_default_rate():
    """Through the convolutions, in 24 updates of 64 steps."""
    args = ppo.Args(num_envs=8, num_steps=8, num_minibatches=2, total_timesteps=64 * 24, anneal_lr=False)
    _, history = learn(ppo, PixelCueEnv(8), args, 24)
    assert history[0]["charts/episodic_return"] < 0.7
    assert np.mean([h["charts/episodic_return"] for h in history[-5:]]) > 0.9


@pytest.mark.slow
def test_ppo_learns_cartpole():
    """Settings with which four seeds end between 409 and 484; random play has 22."""
    args = ppo.Args(
        env_id="CartPole-v1", num_envs=8, num_steps=128, total_timesteps=1024 * 80, learning_rate=5e-4, update_epochs=10,
        clip_coef=0.2, minibatch_by="transition",
    )  # fmt: skip
    _, history = learn(ppo, make_pool("CartPole-v1", 8, 1), args, 80)
    returns = [h["charts/episodic_return"] for h in history if h["charts/episodes"] > 0]
    assert returns[0] < 60
    assert max(np.convolve(returns, np.ones(3) / 3, "valid")) > 350


@pytest.mark.parametrize("script", [ppo, deep_mdp, deep_spi])
def test_beside_adams_epsilon_smaller_gradients_move_little(script):
    """The first step is g / (|g| + eps), of a gradient whose norm is not clipped."""
    gradient = {"w": jnp.full(4, 1e-5)}
    for eps in (1e-5, 1e-8):
        optimizer = script.make_optimizer(script.Args(adam_eps=eps))
        step, _ = optimizer.update(gradient, optimizer.init(gradient))
        assert_allclose(step["w"], 1e-5 / (1e-5 + eps), rtol=1e-4)


@pytest.mark.slow  # by default, the runs of tests/utils/runs/test_resume.py are compared with each other
@pytest.mark.parametrize("script", [ppo, deep_spi])
def test_end_to_end_is_reproducible(script):
    """Three updates, twice from the same seed: PPO on real Atari, Deep SPI on vectors and codes, which compile faster."""
    env_id, num_actions = ("Pong-v5", 6) if script is ppo else ("CartPole-v1", 2)
    codes = {} if script is ppo else {"latent": "categorical", "num_categories": 4, "num_classes": 4}
    args = script.Args(
        **codes, env_id=env_id, num_envs=4, num_steps=4, num_minibatches=2, total_timesteps=16 * 3, fc_layers=(32,)
    )
    (one, metrics), (two, _) = (learn(script, make_pool(args.env_id, 4, args.seed), args, 3) for _ in range(2))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        assert_array_equal(a, b)
    assert all(np.isfinite(v) for h in metrics for v in h.values())
    before = script.init_params(
        jax.random.split(jax.random.key(args.seed))[0], script.make_agent(args, 6 if script is ppo else 2), one.obs
    )
    assert any(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(one.params), strict=True))


def test_episode_statistics_by_hand():
    stats = EpisodeStats.zeros(1)
    trace = []
    for reward, valid, finished in ((2.0, True, False), (3.0, True, True), (0.0, False, False), (5.0, True, False)):
        stats = stats.update(jnp.array([reward]), jnp.array([valid]), jnp.array([finished]))
        trace.append((float(stats.episode_return[0]), int(stats.episode_length[0]), bool(stats.finished[0])))
    assert trace == [(2.0, 1, False), (5.0, 2, True), (0.0, 0, False), (5.0, 1, False)]


def test_ages_by_hand():
    """A life of two steps, the step that only resets, a life of one step that ends the game, a reset, a step."""
    stats, trace = EpisodeStats.zeros(1), []
    for valid, finished in ((1, 0), (1, 0), (0, 0), (1, 1), (0, 0), (1, 0)):
        stats = stats.update(jnp.zeros(1), jnp.array([bool(valid)]), jnp.array([bool(finished)]))
        trace.append((int(stats.age[0]), int(stats.previous_age[0]), int(stats.episode_length[0])))
    assert trace == [(1, 0, 1), (2, 0, 2), (0, 2, 2), (1, 2, 3), (0, 1, 0), (1, 1, 1)]
    stats = EpisodeStats.zeros(1)
    for valid, finished in ((1, 0), (1, 0), (0, 1), (1, 0)):  # the game ends in the step that only resets
        stats = stats.update(jnp.zeros(1), jnp.array([bool(valid)]), jnp.array([bool(finished)]))
    assert (int(stats.age[0]), int(stats.previous_age[0]), int(stats.episode_length[0])) == (1, 2, 1)
