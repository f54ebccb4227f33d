"""DreamSPI: dreams in a world model that is known, who learns from what, and a probe."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import deep_spi
import dream_spi
from envs.confounding_gridworld import RIGHT, build_model, policy_value
from tests.probes import CueEnv
from utils.distributions import Categorical

GAMMA = 0.99


class Lookup(nn.Module):
    """Rows of a constant table by the cell that z marks (and the action, where given)."""

    table: tuple
    wrap: object = lambda rows: rows

    def __call__(self, z, action=None):
        rows = jnp.einsum("nz,z...->n...", z[:, 0], jnp.asarray(self.table, jnp.float32))
        return self.wrap(rows if action is None else rows[jnp.arange(len(z)), action])


class Hard(nn.Module):
    """As `Lookup`, for a distribution whose samples are one-hot."""

    table: tuple

    def __call__(self, z, action):
        rows = jnp.einsum("nz,z...->n...", z[:, 0], jnp.asarray(self.table, jnp.float32))
        return Categorical(rows[jnp.arange(len(z)), action][:, None])


def nested(array):
    return tuple(nested(a) for a in array) if np.ndim(array) else float(array)


def known_world(critic):
    """The gridworld's true dynamics as world model, a policy that mostly goes right, and `critic` [S] as its critic."""
    model = build_model(5, 0.2, GAMMA)
    policy = np.full((16, 4), 0.02)
    policy[:, RIGHT] = 0.94
    value = np.asarray(policy_value(model, jnp.asarray(policy), GAMMA))
    log = lambda p: np.log(np.maximum(p, 1e-30))  # noqa: E731
    ends = model.probability @ model.terminal.astype(float)  # an end follows from cell and action here
    logits = np.where(ends > 0.5, 50.0, -50.0)
    table = np.column_stack([log(policy), critic(value)])
    actor = Lookup(nested(table), lambda rows: (rows[:, :4], rows[:, 4]))
    agent = dream_spi.Agent(
        None, actor, Hard(nested(log(model.probability))), Lookup(nested(model.reward)), Lookup(nested(logits))
    )
    return model, value, agent, dream_spi.Params(None, {}, {}, {}, {})


@pytest.mark.parametrize("soft_done", [False, True])
def test_dreams_in_the_true_model_have_its_exact_values(soft_done):
    """Returns of 20,000 dreams from the start, of 150 steps, without a critic: within 4 standard errors."""
    model, value, agent, params = known_world(lambda value: 0.0 * value)
    args = dream_spi.Args(imagination_horizon=150, soft_done=soft_done, latent="categorical")
    z = jax.nn.one_hot(jnp.full(20_000, model.start), 16)[:, None]
    dreams = jax.jit(partial(dream_spi.imagine, agent=agent, args=args))(params, z, jnp.ones(20_000), jax.random.key(0))
    discounts = GAMMA ** np.arange(150)[:, None]
    returns = np.sum(discounts * np.asarray(dreams.weight * dreams.reward), axis=0)
    assert abs(returns.mean() - value[model.start]) <= 4 * returns.std() / 20_000**0.5 + 1e-3
    assert float(jnp.mean(dreams.weight[-1])) < 0.01  # all but a few had ended
    # with lambda 1 and no critic the first advantage is the return
    advantages = dream_spi.dream_advantages(dreams, GAMMA, 1.0)
    assert_allclose(advantages[0], returns, atol=1e-2)


def test_exact_critics_see_no_advantage_on_average():
    """A dream of one step bootstraps from the critic: with the exact one the mean advantage is 0 in each cell."""
    model, value, agent, params = known_world(lambda value: value)
    args = dream_spi.Args(imagination_horizon=3, latent="categorical")
    cells = np.repeat(np.flatnonzero(~model.terminal), 5000)
    z = jax.nn.one_hot(cells, 16)[:, None]
    dreams = jax.jit(partial(dream_spi.imagine, agent=agent, args=args))(params, z, jnp.ones(len(cells)), jax.random.key(1))
    advantages = np.asarray(dream_spi.dream_advantages(dreams, GAMMA, 0.95))[0]
    for cell in np.unique(cells):
        of = advantages[cells == cell]
        assert abs(of.mean()) <= 4 * of.std() / len(of) ** 0.5 + 1e-3, cell


def test_dream_advantages_by_hand():
    """Three steps, the second ends; gamma 0.5, lambda 0.5."""
    column = lambda *x: jnp.asarray(x, jnp.float32)[:, None]  # noqa: E731
    dreams = dream_spi.Dreams(None, column(1, 2, 4, 8), None, None, column(1, 3, 5), column(1, 0, 1), column(1, 1, 0))
    # errors: 1 + 0.5*2 - 1 = 1;  3 - 2 = 1;  5 + 0.5*8 - 4 = 5
    assert_allclose(dream_spi.dream_advantages(dreams, 0.5, 0.5)[:, 0], [1.25, 1.0, 5.0])
    # with a probability of 0.5 to go on after the second: 3 + 0.25*4 - 2 = 2, and 0.125 of what follows
    soft = dreams._replace(going_on=column(1, 0.5, 1))
    assert_allclose(dream_spi.dream_advantages(soft, 0.5, 0.5)[:, 0], [1 + 0.25 * 2.625, 2.625, 5.0])


class Heads(nn.Module):
    """Logits w z_0 and 0, value z_1."""

    @nn.compact
    def __call__(self, z):
        w = self.param("w", nn.initializers.ones, ())
        return jnp.stack([w * z[:, 0], jnp.zeros_like(z[:, 0])], 1), z[:, 1]


def test_heads_loss_by_hand():
    args = dream_spi.Args(norm_adv=False, clip_coef=0.2)
    batch = dream_spi.HeadsBatch(
        z=jnp.array([[0.0, 0.5], [np.log(3.0), 0.0], [7.0, 7.0]]), action=jnp.array([0, 1, 0]),
        log_prob=jnp.log(jnp.array([0.4, 0.25, 0.5])), value=jnp.array([0.5, 0.0, 3.0]), advantage=jnp.array([2.0, -1.0, 9.0]),
        weight=jnp.array([1.0, 0.5, 0.0]),
    )  # fmt: skip
    params = dream_spi.Params(None, {"params": {"w": 1.0}}, None, None, None)
    agent = dream_spi.Agent(None, Heads(), None, None, None)
    loss, metrics = dream_spi.heads_loss(params, batch, agent, args)
    # ratios 1.25 (clipped to 1.2) and 1; the third step counts for nothing
    policy_loss = (-2 * 1.2 + 0.5 * 1.0) / 1.5
    entropy = (np.log(2) - 0.5 * (0.75 * np.log(0.75) + 0.25 * np.log(0.25))) / 1.5
    value_loss = (0.5 * 2.0**2 + 0.5 * 0.5 * 1.0) / 1.5
    assert_allclose(metrics["dreams/policy_loss"], policy_loss, rtol=1e-5)
    assert_allclose(metrics["dreams/entropy"], entropy, rtol=1e-5)
    assert_allclose(metrics["dreams/value_loss"], value_loss, rtol=1e-5)
    assert_allclose(loss, policy_loss - 0.01 * entropy + 0.5 * value_loss, rtol=1e-5)


def dream_setup(**flags):
    code = {"latent": "categorical", "num_categories": 4, "num_classes": 4}
    args = dream_spi.Args(
        num_envs=16, num_steps=8, total_timesteps=128 * 40, fc_layers=(32,), imagination_horizon=3, **code | flags
    )
    dream_spi.check(args)
    env = CueEnv(16)
    agent, optimizers = dream_spi.make_agent(args, env.num_actions), dream_spi.make_optimizers(args)
    return args, env, agent, optimizers, dream_spi.init_state(args, env, agent, optimizers)


def changed(before, after):
    return {
        name
        for name in before._fields
        if any(
            bool(jnp.any(a != b)) for a, b in zip(*(jax.tree.leaves(getattr(p, name)) for p in (before, after)), strict=True)
        )
    }


MODEL = {"encoder", "transition", "reward", "end"}


REAL = [({}, set()), ({"progressive": "linear"}, {"actor_critic"})]


@pytest.mark.parametrize("flags, real", REAL)
def test_each_update_changes_its_own_parameters_alone(flags, real):
    """To the bit, twice over, so that no moment of the optimizers moves what has no gradient."""
    args, env, agent, optimizers, state = dream_setup(**flags)
    given = {"agent": agent, "optimizers": optimizers, "args": args}
    update_model, update_heads = (jax.jit(partial(f, **given)) for f in (dream_spi.update_model, dream_spi.update_heads))
    state = state._replace(iteration=jnp.asarray(10))  # where progressive learns from both
    for k in range(2):
        after_rollout, steps = deep_spi.rollout(state, jax.random.key(k), env, agent, args)
        advantages = deep_spi.compute_gae(steps, args.gamma, args.gae_lambda)
        after_model, _ = update_model(after_rollout, steps, advantages, jax.random.key(10 + k))
        assert changed(state.params, after_model.params) == MODEL | real
        after_heads, _ = update_heads(after_model, steps, jax.random.key(20 + k))
        assert changed(after_model.params, after_heads.params) == {"actor_critic"}
        state = after_heads


def test_shares_of_real_data_and_dreams():
    args = dream_spi.Args(num_envs=8, num_steps=8, total_timesteps=64 * 10)
    expected = {
        ("none", False): [(0, 1)] * 3,
        ("none", True): [(1, 1)] * 3,
        ("linear", False): [(1, 0), (0.5, 0.5), (0, 1)],
        ("exponential", False): [(1, 0), (1 - 0.9 / 0.99, 0.9 / 0.99), (0, 1)],
    }
    for (progressive, dyna), values in expected.items():
        for iteration, (real, dreams) in zip((0, 5, 10), values, strict=True):
            found = dream_spi.shares(jnp.asarray(iteration), replace(args, progressive=progressive, dyna_style=dyna))
            assert_allclose(found, [1 - iteration / 10, real, dreams], atol=1e-6)


def test_learns_a_probe_in_dreams_alone():
    rates = {"learning_rate": 2e-3, "heads_learning_rate": 2e-3, "transition_loss_coef": 0.1}
    args, env, agent, optimizers, state = dream_setup(**rates, n_imagination_rollouts=2, imagination_epochs=2)
    iteration = jax.jit(partial(dream_spi.train_iteration, env=env, agent=agent, optimizers=optimizers, args=args))
    history = []
    for _ in range(40):
        state, metrics = iteration(state)
        history.append(jax.device_get(metrics))
    assert history[0]["charts/episodic_return"] < 0.7
    assert np.mean([h["charts/episodic_return"] for h in history[-5:]]) > 0.95
    assert_allclose(history[-1]["dreams/length"], 1.0, atol=0.05)  # the predictor knows that episodes are one step long
    assert_array_equal(state.iteration, 40)
    # once all returns are 1, they have no variance to explain
    assert all(np.isfinite(v) for h in history for name, v in h.items() if name != "losses/explained_variance")
