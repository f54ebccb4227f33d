"""The bounds against exact values of random tables, and their parts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from networks.architectures import STEEPEST, ActorCritic
from tests.utils.guarantees.random_tables import random_case
from utils.guarantees.bounds import (
    aged_bound,
    episodic_bound,
    is_vacuous,
    local_error,
    stepwise_bound,
    value_lipschitz,
    value_span,
)
from utils.guarantees.tabular import (
    Tables,
    difference_terms,
    episode_length,
    errors_over_time,
    mean_error,
    total_variation,
    values,
    wasserstein_on_line,
)

CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "states": st.integers(1, 6),
    "latents": st.integers(1, 4),
    "actions": st.integers(1, 4),
    "gamma": st.floats(0, 0.99),
    "ending": st.floats(0.02, 1),
    "noise": st.sampled_from([0.0, 0.1, 1.0]),
    "step": st.sampled_from([0.0, 0.05, 0.5, 2.0]),
    "line": st.booleans(),
}
jitted_local, stepwise, average = jax.jit(local_error), jax.jit(stepwise_bound), jax.jit(episodic_bound)  # compiled once
LARGEST = np.zeros((7, 4))  # states, with the end, and actions
DROPPABLE = ("reward", "transition", "ratio", "length")


def local(reward_error, distance, *others):
    """Local errors of tables of any size: they are padded, so that one program does."""
    sizes = tuple(map(slice, reward_error.shape))
    padded = np.stack([LARGEST, LARGEST])
    padded[:, *sizes] = reward_error, distance
    return np.asarray(jitted_local(*padded, *others), np.float64)[sizes]


def bounds(case, drop=""):
    """Gaps and their bounds, by name. `drop` leaves out a factor or a term, and so makes the bounds wrong."""
    behavior, gamma = case.old[case.phi], case.gamma
    rewards = np.concatenate([case.real.reward.ravel(), case.latent.reward.ravel()])
    span = value_span((rewards.min(), rewards.max()), gamma)
    length = 1.0 if drop == "length" else episode_length(case.real, behavior)
    found, zeta, change = {}, {"step-wise": 0.0, "episodic": 0.0}, {}
    for which, policy in (("old", case.old), ("new", case.new)):
        terms = difference_terms(case.real, case.latent, case.phi, policy, behavior, gamma, case.wasserstein)
        change[which] = (terms.real, terms.latent)
        reward_error = 0.0 * terms.reward_error if drop == "reward" else terms.reward_error
        distance = 0.0 * terms.distance if drop == "transition" else terms.distance
        error = local(reward_error, distance, terms.k_value, gamma, terms.span)
        ratio_max, ratio = (1.0, 1.0) if drop == "ratio" else (terms.ratio_max, terms.ratio)
        weighted = errors_over_time(case.real, behavior, ratio * error)
        step_wise = float(stepwise(weighted, ratio_max, gamma, span))
        episodic = float(average(mean_error(case.real, behavior, error), ratio_max, gamma, length))
        found[f"{which}, step-wise"] = (abs(terms.real - terms.latent), step_wise)
        found[f"{which}, episodic"] = (abs(terms.real - terms.latent), episodic)
        found[f"{which}, span"] = (abs(terms.real - terms.latent), span)
        if not drop and gamma * ratio_max <= 1:
            found[f"{which}, the step-wise bound is the sharper one"] = (step_wise, episodic)
        zeta["step-wise"] += step_wise
        zeta["episodic"] += episodic
    for name, value in zeta.items():
        # |[rho(pi) - rho(pi_b)] - [rho(pibar) - rho(pibar_b)]| <= zeta
        found[f"improvement, {name}"] = (abs(np.subtract(*change["new"]) - np.subtract(*change["old"])), value)
    return found


def violated(found):
    return [name for name, (gap, bound) in found.items() if not gap <= bound * (1 + 1e-4) + 1e-4]


tightness = {}


@pytest.mark.parametrize("cases", [600, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_bound_is_violated_by_random_tables(cases, capsys):
    """`uv run pytest tests/utils/guarantees/test_guarantees.py -k random_tables -m slow` shows how tight they are."""
    tightness.clear()

    @settings(max_examples=cases, deadline=None, database=None)
    @given(**CASES)
    def check(**chosen):
        found = bounds(random_case(**chosen))
        assert not violated(found), found
        for name, (gap, bound) in found.items():
            tightness.setdefault(name, []).append((gap, bound))

    check()
    assert len(tightness["new, step-wise"]) >= cases
    with capsys.disabled():
        for name in ("new, step-wise", "new, episodic", "improvement, step-wise", "improvement, episodic"):
            pairs = np.array(tightness[name])
            finite = np.isfinite(pairs[:, 1]) & (pairs[:, 1] > 1e-4)  # what is smaller is rounding
            ratio = pairs[finite, 0] / pairs[finite, 1]
            quantiles = ", ".join(f"{np.quantile(ratio, q):.2f}" for q in (0.5, 0.75, 1.0))
            print(f"\n{name}: {len(pairs)} cases, {finite.mean():.0%} bounded by neither 0 nor inf;", end=" ")
            print(f"gap / bound: median, upper quartile, largest {quantiles}", end="")


@pytest.mark.parametrize("drop", DROPPABLE)
def test_wrong_bounds_are_caught(drop):
    """Each term and each factor is needed: without it, the same check finds violations."""
    rng = np.random.default_rng(0)

    def caught(seed):
        sizes = {name: int(rng.integers(1, n)) for name, n in (("states", 7), ("latents", 5), ("actions", 5))}
        noise, step = rng.choice([0.0, 0.1, 1.0]), rng.choice([0.05, 0.5, 2.0])
        case = random_case(seed, **sizes, gamma=rng.uniform(0, 0.99), ending=rng.uniform(0.02, 1), noise=noise, step=step,
                           line=bool(rng.integers(2)))  # fmt: skip
        return bool(violated(bounds(case, drop)))

    assert any(caught(seed) for seed in range(300))


@pytest.mark.parametrize("likely, ratio_max", [(0.5, 1.9), (0.3, 3.0), (0.9, 1.1)])
def test_the_power_of_the_ratio_is_needed_and_the_bound_attained(likely, ratio_max):
    """A corridor that only action 0 goes along, and the model is wrong about its reward. pi takes it `ratio_max` times as often
    as pi_b, so pi is in place t of the corridor ratio_max^t times as often."""
    places, gamma = 8, 0.9
    probability, reward = np.zeros((places + 1, 2, places + 1)), np.zeros((places + 1, 2))
    probability[range(places), 0, range(1, places + 1)] = 1.0
    probability[:, 1, -1] = probability[-1, :, -1] = 1.0
    reward[:-1, 0] = 1.0
    real = Tables(probability, reward, np.eye(places + 1)[0])
    latent = real._replace(reward=0.0 * reward)
    policy = lambda p: np.tile([p, 1.0 - p], (places + 1, 1))  # noqa: E731
    old, new = policy(likely), policy(likely * ratio_max)
    terms = difference_terms(real, latent, np.arange(places + 1), new, old, gamma, total_variation)
    weighted = errors_over_time(real, old, terms.ratio * terms.reward_error)
    assert_allclose(terms.ratio_max, ratio_max)
    assert_allclose(stepwise_bound(jnp.asarray(weighted), ratio_max, gamma, 100.0), abs(terms.real - terms.latent), rtol=1e-5)
    assert stepwise_bound(jnp.asarray(weighted), 1.0, gamma, 100.0) < 0.99 * abs(terms.real - terms.latent)


@settings(max_examples=400, deadline=None)
@given(**CASES)
def test_lipschitz_constant_of_the_value_on_random_tables(**chosen):
    """K_V from the constants of rewards, transitions and policy, against the steepest slope of the exact value."""
    case = random_case(**chosen)
    latent, codes = case.latent, np.eye(len(case.latent.reward))
    case.new[-1] = case.new[0]
    d = case.wasserstein(codes[:, None], codes[None])
    slope = lambda differences: np.max(np.divide(differences, d, where=d > 0, out=np.zeros_like(d)))  # noqa: E731
    actions = range(latent.reward.shape[1])
    k_reward = max(slope(np.abs(latent.reward[:, None, a] - latent.reward[None, :, a])) for a in actions)
    k_transition = max(slope(case.wasserstein(latent.probability[:, None, a], latent.probability[None, :, a])) for a in actions)
    k_policy = slope(total_variation(case.new[:, None], case.new[None]))
    span = value_span((latent.reward.min(), latent.reward.max()), case.gamma)
    k_value = float(value_lipschitz(k_reward, k_transition, k_policy, case.gamma, span))
    terms = difference_terms(case.real, latent, case.phi, case.new, case.old[case.phi], case.gamma, case.wasserstein)
    assert terms.k_value <= k_value * (1 + 1e-4) + 1e-4
    if abs(case.gamma * k_transition - 1) > 1e-5:  # within rounding of 1 it may be either
        assert np.isfinite(k_value) == (case.gamma * k_transition < 1)


@settings(max_examples=200, deadline=None)
@given(**CASES)
def test_lipschitz_constant_of_the_value_with_ends_apart(**chosen):
    """The same where the end is no latent at some distance, but a probability that depends on z."""
    case = random_case(**chosen | {"line": False})
    x = np.random.default_rng(chosen["seed"]).uniform(-1, 1, len(case.latent.reward) - 1)
    d = np.abs(x[:, None] - x[None])
    ends = case.latent.probability[:-1, :, -1]
    following = case.latent.probability[:-1, :, :-1] / (1 - ends + 1e-300)[..., None]
    slope = lambda differences: np.max(np.divide(differences, d, where=d > 0, out=np.zeros_like(d)))  # noqa: E731
    actions, between = range(case.latent.reward.shape[1]), wasserstein_on_line(x)
    rewards = case.latent.reward[:-1]
    k_reward = max(slope(np.abs(rewards[:, None, a] - rewards[None, :, a])) for a in actions)
    k_transition = max(slope(between(following[:, None, a], following[None, :, a])) for a in actions)
    k_end = max(slope(np.abs(ends[:, None, a] - ends[None, :, a])) for a in actions)
    k_policy = slope(total_variation(case.new[:-1, None], case.new[None, :-1]))
    span = value_span((rewards.min(), rewards.max()), case.gamma)
    value = values(case.latent, case.new, case.gamma)[:-1]
    k_value = float(value_lipschitz(k_reward, k_transition, k_policy, case.gamma, span, k_end))
    assert slope(np.abs(value[:, None] - value[None])) <= k_value * (1 + 1e-4) + 1e-4


def test_parts_by_hand():
    assert value_span((-1.0, 1.0), 0.5) == 4.0
    assert value_span((0.5, 1.0), 0.5) == 2.0  # an episode that ends at once returns 0
    with pytest.raises(ValueError, match="gamma 1"):
        value_span((-1.0, 1.0), 1.0)
    assert_allclose(value_lipschitz(1.0, 0.5, 0.1, 0.8, 10.0), (1 + 1) / 0.6, rtol=1e-6)
    assert value_lipschitz(1.0, 2.0, 0.0, 0.5, 10.0) == jnp.inf  # gamma K_P = 1
    assert value_lipschitz(1.0, 0.0, 0.0, 0.5, jnp.inf) == 1.0  # a policy that ignores z needs no bounded rewards
    errors, distances = jnp.array([0.1, 0.1, 0.1]), jnp.array([0.0, 0.2, 5.0])
    assert_allclose(local_error(errors, distances, 3.0, 0.5, 4.0), [0.1, 0.4, 2.1], rtol=1e-6)
    assert_allclose(local_error(errors, distances, jnp.inf, 0.5, 4.0), [0.1, 2.1, 2.1], rtol=1e-6)
    assert_allclose(value_lipschitz(1.0, 0.5, 0.1, 0.8, 10.0, k_end=0.25), (1 + 1 + 2) / 0.6, rtol=1e-6)
    # horizons 0, 1, 2: 8;  1 + 4;  1 + 0.5 * 1.2 * 2 + 2
    assert_allclose(stepwise_bound(jnp.array([1.0, 2.0]), 1.2, 0.5, 8.0), 4.2, rtol=1e-6)
    assert_allclose(stepwise_bound(jnp.array([9.0, 9.0]), 1.2, 0.5, 8.0), 8.0, rtol=1e-6)
    # (gamma D)^1999 is far beyond float32, but the episode is over
    assert_allclose(stepwise_bound(jnp.zeros(2000).at[0].set(1.0), 2.0, 0.9, 1e3), 1.0, rtol=1e-5)
    assert_allclose(episodic_bound(0.1, 1.25, 0.8, 20.0), 2.5, rtol=1e-6)
    assert episodic_bound(0.1, 1.26, 0.8, 20.0) == jnp.inf
    for zeta, vacuous in ((3.9, False), (4.0, True), (jnp.inf, True), (jnp.nan, True)):
        assert bool(is_vacuous(zeta, 4.0)) == vacuous


def test_what_is_not_a_number_stays_so_and_zero_times_infinity_is_none():
    """A world model that has diverged must not look like a good one."""
    nan, one, zero, young, valid = jnp.array([jnp.nan, 0.1]), jnp.ones(2), jnp.zeros(2), jnp.zeros(2, int), jnp.ones(2, bool)
    assert jnp.isnan(local_error(nan, one, 1.0, 0.5, 4.0)[0]) and jnp.isnan(local_error(one, nan, 1.0, 0.5, 4.0)[0])
    assert jnp.isnan(stepwise_bound(nan, 1.1, 0.5, 8.0)) and jnp.isnan(aged_bound(nan, young, valid, 1.1, 0.5, 9.0))
    assert jnp.isnan(episodic_bound(jnp.nan, 1.0, 0.5, 9.0))
    assert episodic_bound(0.0, 1.0, 0.9, jnp.inf) == 0 and aged_bound(zero, young, valid, 1.0, 0.9, jnp.inf) == 0
    assert stepwise_bound(jnp.zeros(2000), 1.0, 0.9, jnp.inf) == jnp.inf
    assert value_lipschitz(1.0, 0.5, jnp.inf, 0.9, 0.0) == pytest.approx(1 / 0.55)


@pytest.mark.parametrize("ratio_max", [1.0, 1.05, 1.3])
def test_transitions_at_random_times_give_the_step_wise_sum(ratio_max):
    """Two episodes, of 3 and 1 steps: the mean length is 2."""
    errors = jnp.array([0.5, 1.0, 2.0, 0.3, 99.0])
    ages, valid = jnp.array([0, 1, 2, 0, 7]), jnp.array([1, 1, 1, 1, 0], bool)
    expected = ((0.5 + 0.3) + 0.9 * ratio_max * 1.0 + (0.9 * ratio_max) ** 2 * 2.0) / 2
    assert_allclose(aged_bound(errors, ages, valid, ratio_max, 0.9, 2.0), expected, rtol=1e-6)
    if ratio_max * 0.9 <= 1:
        assert expected <= episodic_bound(3.8 / 4, ratio_max, 0.9, 2.0)


ACTIVATED = [((), "relu"), ((32,), "relu"), *(((8, 64), activation) for activation in STEEPEST)]
OTHERS = [(layers, activation) for layers in ((), (32,)) for activation in STEEPEST if activation != "relu"]


@pytest.mark.parametrize("layers, activation", ACTIVATED + [pytest.param(*x, marks=pytest.mark.slow) for x in OTHERS])
def test_policy_is_as_lipschitz_as_it_says(activation, layers):
    actor_critic = ActorCritic(5, layers, activation)
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(64, 1, 1, 16)), jnp.float32)

    @jax.jit
    def measured(draws):
        params = actor_critic.init(jax.random.key(1), z)
        leaves, tree = jax.tree.flatten(params)
        noise = [0.3 * draw.reshape(x.shape) for draw, x in zip(draws, leaves, strict=True)]
        params = jax.tree.unflatten(tree, [3.0 * x + n for x, n in zip(leaves, noise, strict=True)])
        policy = lambda z: jax.nn.softmax(actor_critic.apply(params, z)[0])  # noqa: E731
        jacobian = jax.vmap(jax.jacobian(lambda z: policy(z[None])[0]))(z).reshape(64, 5, 16)
        return actor_critic.policy_lipschitz(params), policy(z), jacobian

    shapes = jax.tree.leaves(jax.eval_shape(actor_critic.init, jax.random.key(1), z))
    constant, policy, jacobian = jax.device_get(measured([rng.normal(size=x.size).astype(np.float32) for x in shapes]))
    # the largest of |J v| / |v| over 64 points, |.| of the output being total variation
    signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 5)).reshape(5, -1)
    steepest = 0.5 * np.max(np.linalg.norm(np.einsum("nai,as->nsi", jacobian, signs), axis=-1))
    assert 0.01 * constant < steepest <= constant * (1 + 1e-5)
    far = 0.5 * np.sum(np.abs(policy - policy[::-1]), axis=1)
    apart = np.asarray(z - z[::-1]).reshape(64, -1)
    assert np.all(far <= constant * np.linalg.norm(apart, axis=1) + 1e-6)
    assert ActorCritic(5, (8,), activation, layer_norm=True).policy_lipschitz({}) == jnp.inf


def test_slopes_of_activations():
    from networks.architectures import ACTIVATIONS

    x = jnp.linspace(-6, 6, 20_001)
    for name, f in ACTIVATIONS.items():
        steepest = float(jnp.max(jnp.abs(jax.jit(jax.vmap(jax.grad(f)))(x))))
        assert 0.99 * STEEPEST[name] < steepest <= STEEPEST[name]
