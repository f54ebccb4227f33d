"""The monitor's terms against exact ones, a representation that it must flag, and what it costs a run: nothing but time."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import deep_spi
from envs.confounding_gridworld import RIGHT, UP, ConfoundingGridworld
from networks.architectures import ActorCritic
from tests.probes import CueEnv, make_iteration
from tests.utils.dreams.test_dreams import PerAction, SmallEncoder
from tests.utils.dreams.test_replay import noise
from utils.distributions import Categorical, Deterministic
from utils.guarantees.bounds import local_error, stepwise_bound, value_span
from utils.guarantees.monitor import PREFIX, model_terms, monitor
from utils.guarantees.tabular import (
    difference_terms,
    episode_length,
    errors_over_time,
    fitted_model,
    mean_error,
    of_environment,
    total_variation,
)
from utils.occasionally import MEASURED, only_measured
from utils.runs.flags import check_flags

GAMMA = 0.9


class TableEncoder(nn.Module):
    """The observation is the index of a cell, the latent its code."""

    phi: tuple[int, ...]

    def __call__(self, obs):
        return jax.nn.one_hot(jnp.asarray(self.phi)[obs], max(self.phi) + 1)[:, None]


class Table(nn.Module):
    """Rows of a table, by code and action; as `wrap` returns them."""

    wrap: object

    def __call__(self, z, action):
        rows = jnp.einsum("nz,z...->n...", z[:, 0], self.get_variable("params", "table"))
        return self.wrap(rows[jnp.arange(len(z)), action])


class TableHeads(nn.Module):
    """Rows of a table of logits, by code, and the value 0."""

    @nn.compact
    def __call__(self, z, obs=None):
        logits = jnp.einsum("nz,za->na", z[:, 0], self.get_variable("params", "table"))
        return logits, jnp.zeros(len(z))


def table(values):
    return {"params": {"table": jnp.asarray(values, jnp.float32)}}


class Played:
    """Episodes of the gridworld under tables, and what is exactly true of them. `merged` gives both choices one code."""

    def __init__(self, merged):
        self.env = ConfoundingGridworld(2000, 3)
        self.env.frames = np.arange(len(self.env.frames))
        model = self.env.model
        self.real = of_environment(model.probability, model.reward, model.terminal, model.start)
        alive = np.flatnonzero(~model.terminal)
        code = np.arange(len(alive) + 1)
        self.upper, self.lower = (int(np.flatnonzero(alive == c)[0]) for c in model.choices)
        if merged:
            code[self.lower] = self.upper
        self.phi = code
        cells = np.full(len(model.terminal), code[-1])
        cells[alive] = code[:-1]
        self.old = np.full((len(code), 4), 0.05)
        self.old[:, RIGHT] = 0.85
        self.old[self.upper] = self.old[self.lower] = [0.3, 0.05, 0.05, 0.6]
        self.new = self.old.copy()
        self.new[self.upper, UP] += 0.012
        self.new[self.upper, RIGHT] -= 0.012
        if merged:
            self.new[self.lower] = self.new[self.upper]
        # the model knows the choice from the upper path alone
        weights = np.ones_like(self.real.reward)
        weights[self.lower] *= 1e-6 if merged else 1.0
        self.latent = fitted_model(self.real, code, len(code), weights)
        self.behavior = self.old[code]

        encoder, actor = TableEncoder(tuple(int(c) for c in cells)), TableHeads()
        self.agent = deep_spi.Agent(encoder, actor, Table(lambda rows: Categorical(rows[:, None])), Table(lambda rows: rows))
        log = lambda p: np.log(np.maximum(p, 1e-30))  # noqa: E731
        model_tables = (table(log(self.latent.probability)), table(self.latent.reward))
        self.params = [deep_spi.Params({}, table(log(policy)), *model_tables) for policy in (self.old, self.new)]
        self.args = deep_spi.Args(num_envs=2000, num_steps=100, latent="categorical", gamma=GAMMA)
        env_state, obs = self.env.reset()
        state = deep_spi.TrainState(self.params[0], None, env_state, obs, jax.random.key(0), None)
        play = jax.jit(partial(deep_spi.rollout, env=self.env, agent=self.agent, args=self.args))
        state, _ = play(state)  # after which the agents no longer walk in step
        _, self.steps = play(state)
        change = deep_spi.policy_change(self.params[1], self.steps, self.agent)
        measure = partial(monitor, agent=self.agent, args=self.args, reward_range=self.env.reward_range)
        measured = jax.jit(measure)(old=self.params[0], new=self.params[1], steps=self.steps, log_ratios=change,
                                    key=jax.random.key(2))  # fmt: skip
        self.measured = {name.removeprefix(PREFIX): float(value) for name, value in measured.items()}

    def terms(self, policy):
        return difference_terms(self.real, self.latent, self.phi, policy, self.behavior, GAMMA, total_variation)


@pytest.fixture(scope="module")
def played():
    return {name: Played(name == "merged") for name in ("faithful", "merged")}


@pytest.mark.parametrize("name", ["faithful", "merged"])
def test_terms_agree_with_exact_ones(played, name):
    """Estimates from 200,000 steps."""
    case = played[name]
    exact, measured = case.terms(case.new), case.measured
    length = episode_length(case.real, case.behavior)
    assert_allclose(measured["episode_length"], length, rtol=0.05)
    assert_allclose(measured["ratio_max"], exact.ratio_max, rtol=1e-4)
    assert_allclose(measured["reward_error"], mean_error(case.real, case.behavior, exact.reward_error), rtol=0.1, atol=1e-5)
    # the sample's coupling: how much probability the model gives to other codes than the one that followed
    codes = np.eye(len(case.latent.reward))
    following, predicted = case.real.probability @ codes[case.phi], case.latent.probability[case.phi]
    mismatch = np.sum(following * (1 - predicted), axis=-1) - following[..., -1] * (1 - predicted[..., -1])
    coupled = mean_error(case.real, case.behavior, mismatch)
    assert_allclose(measured["transition_error"], coupled, rtol=0.1)
    assert coupled >= mean_error(case.real, case.behavior, exact.distance)
    span = value_span(case.env.reward_range, GAMMA)
    assert_allclose([measured["k_value"], measured["value_span"]], span, rtol=1e-6)
    assert GAMMA * exact.ratio_max <= 1
    error = measured["reward_error"] + GAMMA * span * measured["transition_error"]
    zeta = (exact.ratio_max + 1) * measured["episode_length"] * error
    assert_allclose(measured["zeta"], zeta, rtol=1e-3)
    # the step-wise form, estimated from transitions of all ages, against the sum over time of exact errors
    total = 0.0
    for policy in (case.new, case.old):
        terms = case.terms(policy)
        weighted = errors_over_time(case.real, case.behavior, terms.ratio * (terms.reward_error + GAMMA * span * mismatch))
        total += np.sum((GAMMA * terms.ratio_max) ** np.arange(len(weighted)) * weighted)
    assert_allclose(measured["zeta_stepwise"], total, rtol=0.1)
    assert measured["zeta_stepwise"] < measured["zeta"]


def test_merged_choices_are_flagged_and_faithful_ones_are_not(played):
    """With one code for both choices, and a model that knows the upper one, "up" looks good and is ruinous."""
    change, zeta = {}, {}
    for name, case in played.items():
        old, new = case.terms(case.old), case.terms(case.new)
        change[name] = (new.real - old.real, new.latent - old.latent)
        zeta[name], span = 0.0, value_span(case.env.reward_range, GAMMA)
        for terms in (old, new):
            errors, distances = jnp.asarray(terms.reward_error), jnp.asarray(terms.distance)
            weighted = terms.ratio * np.asarray(local_error(errors, distances, terms.k_value, GAMMA, terms.span))
            weighted = errors_over_time(case.real, case.behavior, weighted)
            zeta[name] += float(stepwise_bound(jnp.asarray(weighted), terms.ratio_max, GAMMA, span))
    real, latent = change["merged"]
    assert latent > 0 > real  # looks good, and is harmful
    assert played["merged"].measured["reward_error"] > 0.3
    assert latent - zeta["merged"] <= real < 0  # the bound promises nothing
    real, latent = change["faithful"]
    assert real == pytest.approx(latent, abs=1e-9) and real > 0
    assert played["faithful"].measured["reward_error"] < 1e-5
    assert zeta["faithful"] < 1e-4 < real  # the bound promises the whole improvement


class CueCodes(nn.Module):
    """The cue that an observation of `CueEnv` shows is the latent."""

    def __call__(self, obs):
        return obs[:, None]


def test_training_is_the_same_with_it_and_only_every_so_often_measured():
    """With tables as networks, which compile faster."""
    plain = deep_spi.Args(
        num_envs=8, num_steps=4, num_minibatches=2, total_timesteps=32 * 3, learning_rate=1e-1, latent="categorical"
    )
    rng = np.random.default_rng(0)
    model_tables = table(rng.normal(size=(3, 3, 3))), table(rng.normal(size=(3, 3)))
    params = deep_spi.Params({}, table(0.1 * rng.normal(size=(3, 3))), *model_tables)
    agent = deep_spi.Agent(CueCodes(), TableHeads(), Table(lambda rows: Categorical(rows[:, None])), Table(lambda rows: rows))
    results = []
    for args in (plain, replace(plain, monitor_guarantee=True, monitor_every=2)):
        env, optimizer = CueEnv(8), deep_spi.make_optimizer(args)
        iteration = make_iteration(deep_spi, env, agent, optimizer, args)
        start = jax.jit(optimizer.init)(params), *env.reset(), jax.random.key(0), jnp.zeros((), jnp.int32)
        state, history = deep_spi.TrainState(params, *start), []
        for _ in range(3):
            state, metrics = iteration(state)
            history.append(jax.device_get(metrics))
        assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, jax.device_get((params, state.params))), strict=True))
        results.append((state.params, history))
    (params, history), (watched, watched_history) = results
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(watched), strict=True):
        assert_allclose(a, b, atol=1e-5)
    names = {name for name in watched_history[0] if name.startswith(PREFIX)}
    assert names == set(watched_history[0]) - set(history[0]) and len(names) == 12
    for i, metrics in enumerate(watched_history):
        others = names - {PREFIX + MEASURED}
        assert metrics[PREFIX + MEASURED] == (i != 1) and not any(np.isnan(metrics[name]) for name in names)
        assert i != 1 or not any(metrics[name] for name in others)
        assert others & set(only_measured(metrics)) == (set() if i == 1 else others)
    last = watched_history[2]
    assert last[PREFIX + "episode_length"] == 1
    # all episodes end after a step: nothing but rewards can be wrong, and ages are 0
    assert last[PREFIX + "transition_error"] == 0
    assert last[PREFIX + "vacuous"] == 0
    assert last[PREFIX + "zeta_stepwise"] < last[PREFIX + "zeta"] or np.isinf(last[PREFIX + "zeta"])


CONSTANTS = [
    ({"transition_density": "deterministic"}, set()),
    ({"lipschitz_nets": False}, {"k_reward", "k_transition", "k_value"}),
    ({"transition_density": "deterministic", "lipschitz_constant": 1.02}, {"k_value"}),
    ({"transition_density": "deterministic", "use_layer_norm": True}, {"k_policy", "k_value"}),
    ({"latent": "categorical", "num_categories": 4, "num_classes": 4}, set()),
]


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flags, infinite", CONSTANTS)
def test_constants_that_are_not_certified_are_infinite(flags, infinite, real):
    """Flags say what is certified, and the heads how steep the policy is: unless `real`, other networks are small ones."""
    args = deep_spi.Args(num_envs=4, num_steps=3, fc_layers=(16,), **flags)
    check_flags(replace(args, num_envs=8))
    env = CueEnv(4)
    agent = deep_spi.make_agent(args, 3)
    if not real:
        small = (CueCodes(), Categorical) if args.latent == "categorical" else (SmallEncoder(), Deterministic)
        agent = agent._replace(encoder=small[0], transition=PerAction(small[1]), reward=PerAction())
    steps = noise(0, 5, 4)
    steps = steps._replace(obs=jax.nn.one_hot(jnp.argmax(steps.obs, axis=-1), 3))
    assert not steps.valid.all() and steps.terminated.any() and steps.truncated.any()
    span = value_span(env.reward_range, args.gamma)

    @jax.jit
    def measure(key):
        params = deep_spi.init_params(key, agent, steps.obs[0])
        errors = model_terms(params, agent, steps, jax.random.key(2), args, env.reward_range)
        return errors, local_error(*errors[:2], errors[2]["k_value"], args.gamma, span)

    (reward_error, distance, constants), error = jax.device_get(measure(jax.random.key(0)))
    assert {name for name, value in constants.items() if np.isinf(value)} == infinite
    assert all(np.isfinite(x).all() for x in (reward_error, distance, error))
    assert (reward_error >= 0).all() and (distance >= 0).all()


def test_distance_of_continuous_latents_by_hand():
    """z' = z + 3 in 1 x 1 x 4 numbers, the environment stays where it is: 3 sqrt(4). The step that ends counts 0."""

    class Moved(nn.Module):
        def __call__(self, z, action):
            return SimpleNamespace(sample=lambda key: z + 3.0)

    class Half(nn.Module):
        def __call__(self, z, action):
            return jnp.full(len(z), 7.0)

    class AsIs(nn.Module):
        def __call__(self, obs):
            return obs

    obs = np.broadcast_to(np.arange(2.0, dtype=np.float32)[:, None, None, None], (3, 2, 1, 1, 4))
    flags = lambda *where: jnp.asarray(np.array([[(t, b) in where for b in (0, 1)] for t in (0, 1)]))  # noqa: E731
    reward = jnp.array([[0.25, -1.0], [1.0, 0.0]])
    episodes = {"reward": reward, "terminated": flags((0, 1)), "truncated": flags(), "valid": flags((0, 0), (0, 1), (1, 0))}
    steps = SimpleNamespace(obs=jnp.asarray(obs), action=jnp.asarray(np.zeros((2, 2), np.int32)), **episodes)
    agent = deep_spi.Agent(AsIs(), ActorCritic(2, ()), Moved(), Half())
    args = deep_spi.Args(gamma=0.5)

    @jax.jit
    def measure(key):
        params = deep_spi.Params({}, agent.actor_critic.init(key, steps.obs[0]), {}, {})
        return model_terms(params, agent, steps, key, args, (-1.0, 1.0))

    reward_error, distance, _ = measure(jax.random.key(0))
    assert_allclose(distance, [[6.0, 0.0], [6.0, 0.0]])
    assert_allclose(reward_error, [[0.75, 2.0], [0.0, 0.0]])  # the prediction, 7, counts as 1
