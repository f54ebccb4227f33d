"""Every world model and its losses: against numbers computed otherwise, on one stored batch of Pong, and in training on it."""

from dataclasses import replace
from functools import partial
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial import distance

import deep_mdp_ppo as deep_mdp
import deep_spi
from envs.registry import make_pool
from networks.architectures import ACTIVATIONS, Encoder, make_encoder
from networks.world_models import CATEGORICAL as WORLD_MODELS
from networks.world_models import make_world_model, softmoe, transformer, unconstrained
from tests.probes import make_iteration
from tests.utils.dreams.test_dreams import drawn
from utils.distributions import DENSITIES, Categorical, Deterministic, Normal, count_maps
from utils.losses import smooth_l1_loss
from utils.runs.flags import check_flags
from utils.world_model import (
    CATEGORICAL_COSTS,
    gradient_penalty,
    jensen_shannon_distance,
    penalizes_gradients,
    scale_gradient,
    transition_loss,
)

KEY = jax.random.key(0)
PENALTIES = ({}, {"use_wgan_gp": True}, {"lambda_gp": 0.0})
CONTINUOUS = [{"transition_density": d} for d in DENSITIES]
CONTINUOUS += [{"transition_density": d, "lipschitz_nets": False} | p for d in DENSITIES for p in PENALTIES]
CATEGORICAL = [
    {"latent": "categorical", "world_model": w, "categorical_cost": c} | s
    for w in WORLD_MODELS
    for c, cost in CATEGORICAL_COSTS.items()
    for s in (({}, {"use_gumbel_softmax": True}) if cost.samples else ({},))
]
CONTINUOUS += [{"transition_density": "deterministic", "lipschitz_nets": n, "transition_layers": (32,)} for n in (False, True)]
UNCONSTRAINED = {"transition_density": "mixture_normal", "lipschitz_nets": False}
QUICK = [
    {"transition_density": "mixture_normal"},
    {"transition_density": "deterministic", "lipschitz_nets": False, "transition_layers": (32,)},
    {"latent": "categorical", "world_model": "fc", "categorical_cost": "l2", "use_gumbel_softmax": True},
    {"latent": "categorical", "world_model": "softmoe", "categorical_cost": "hamming"},
]
assert all(flags in CONTINUOUS + CATEGORICAL for flags in [UNCONSTRAINED, *QUICK])
QUICK_AND_ALL = [("small_batch", flags) for flags in QUICK]
QUICK_AND_ALL += [pytest.param("stored_batch", flags, marks=pytest.mark.slow) for flags in CONTINUOUS + CATEGORICAL]
name = lambda flags: "-".join(str(v) for v in flags.values())  # noqa: E731


def test_an_unknown_density_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown transition density 'gamma'; choose from deterministic, normal"):
        count_maps("gamma", 5)
    network = make_world_model(deep_spi.Args(transition_density="gamma"), 3)[0]
    with pytest.raises(ValueError, match="unknown transition density 'gamma'"):
        network.init(KEY, jnp.zeros((1, 1, 1, 8)), jnp.zeros(1, jnp.int32))


def test_flags_offer_what_is_registered():
    hints = get_type_hints(deep_spi.Args)
    offered = {flag: get_args(hints[flag]) for flag in ("transition_density", "world_model", "categorical_cost", "activation")}
    assert offered == {
        "transition_density": tuple(DENSITIES),
        "world_model": tuple(WORLD_MODELS),
        "categorical_cost": tuple(CATEGORICAL_COSTS),
        "activation": tuple(ACTIVATIONS),
    }


def codes(*classes, count=4):
    return jax.nn.one_hot(jnp.asarray(classes), count)


def test_costs_of_codes_by_hand():
    """Two variables with two classes; the prediction is all but certain, so that a sample is known."""
    certain = jnp.array([[[50.0, 0.0], [0.0, 50.0]]])
    even = jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]]]))
    next_z = codes([0, 0], count=2)

    @jax.jit
    def costs(logits):
        return {name: cost.distance(Categorical(logits), next_z, KEY)[0] for name, cost in CATEGORICAL_COSTS.items()}

    found = costs(certain)
    assert_allclose(found["hamming"], [0, 1], atol=1e-6)
    assert_allclose(found["l2"], [0, 2], atol=1e-6)
    assert_allclose(found["cross_entropy"], [0, 50], atol=1e-5)
    assert_allclose(found["jensen_shannon"], [0, np.sqrt(np.log(2))], atol=1e-4)
    found = costs(even)
    assert_allclose(found["cross_entropy"], -np.log([0.25, 0.5]), rtol=1e-6)
    assert_allclose(found["jensen_shannon"][1], distance.jensenshannon([0.5, 0.5], [1, 0]), rtol=1e-4)


@jax.jit
def shannon(p, q):
    """The distance, that in the other direction, that of p from itself, and the gradients."""
    p, q = jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)
    gradients = jax.grad(jensen_shannon_distance, argnums=(0, 1))(p, q)
    return jensen_shannon_distance(p, q), jensen_shannon_distance(q, p), jensen_shannon_distance(p, p), gradients


probabilities = (
    st.lists(st.floats(0, 1), min_size=32, max_size=32).filter(lambda p: sum(p) > 1e-3).map(lambda p: np.array(p) / sum(p))
)


@settings(deadline=None, max_examples=50)
@given(p=probabilities, q=probabilities)
def test_jensen_shannon_is_a_bounded_symmetric_distance(p, q):
    found, mirrored, of_itself, gradients = jax.device_get(shannon(p, q))
    assert_allclose(found**2, distance.jensenshannon(p, q) ** 2, atol=3e-6)
    assert found == mirrored
    assert of_itself == 0
    assert found <= np.sqrt(np.log(2)) + 1e-6
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_jensen_shannon_pulls_disjoint_distributions_together():
    found, _, _, (gradient, _) = shannon(*np.eye(4)[:2])
    assert_allclose(found, np.sqrt(np.log(2)), rtol=1e-5)
    assert gradient[1] < gradient[0] and gradient[1] < gradient[2]  # more of what q has


@pytest.mark.parametrize("cost", CATEGORICAL_COSTS)
def test_balancing_is_the_sum_of_two_losses_with_a_stopped_side(cost):
    args = deep_spi.Args(latent="categorical", categorical_cost=cost)
    logits, other = jax.random.normal(KEY, (2, 3, 5, 4))
    next_z = lambda x: jax.nn.softmax(x)  # noqa: E731
    plain = lambda a, b: transition_loss(Categorical(a), next_z(b), KEY, args).sum()  # noqa: E731
    balanced = lambda a, b: transition_loss(Categorical(a), next_z(b), KEY, replace(args, w_balancing=0.8)).sum()  # noqa: E731
    stop = jax.lax.stop_gradient
    written_out = lambda a, b: 0.8 * plain(a, stop(b)) + 0.2 * plain(stop(a), b)  # noqa: E731

    @jax.jit
    def both(logits, other):
        gradients = (jax.grad(f, argnums=(0, 1))(logits, other) for f in (balanced, written_out))
        return balanced(logits, other), plain(logits, other), *gradients, scale_gradient(logits, 0.3)

    found, expected, gradients, expected_gradients, same = both(logits, other)
    assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert_allclose(a, b, atol=1e-6)
    assert_array_equal(same, logits)


def test_loss_of_unconstrained_normals_is_the_expected_error_and_that_of_certified_ones_a_sample():
    predicted = Normal(jnp.zeros((2, 1, 1, 3)), jnp.ones((2, 1, 1, 3)))
    next_z = jnp.full((2, 1, 1, 3), 2.0)
    noise = np.random.default_rng(0).normal(size=100_000)
    args = deep_spi.Args(lipschitz_nets=False)
    errors = np.abs(noise - 2)
    tolerance = 3 * 4 * errors.std() / np.sqrt(len(errors))
    assert_allclose(transition_loss(predicted, next_z, KEY, args), 3 * errors.mean(), atol=tolerance)
    certified = predicted.replace(noise_clip=1.0)
    sampled = smooth_l1_loss(certified.sample(KEY) - next_z).sum((1, 2, 3))
    assert_allclose(transition_loss(certified, next_z, KEY, deep_spi.Args()), sampled, rtol=1e-6)
    z = jnp.ones((2, 2, 2, 64))
    for lipschitz_nets, clip in ((True, 1.0), (False, None)):
        network = make_world_model(deep_spi.Args(lipschitz_nets=lipschitz_nets), 3)[0]

        def clipped_noise(key, network=network, clip=clip):
            predicted, _ = network.init_with_output(key, z, jnp.zeros(2, jnp.int32))
            assert predicted.noise_clip == clip
            return predicted.loc

        assert jax.eval_shape(clipped_noise, KEY).shape == z.shape  # traced, not compiled


MIXTURE, SINGLE = ("mixture_normal", 5), ("normal", 1)


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize(
    "density, components, layers",
    [(*SINGLE, ()), pytest.param(*SINGLE, (8,), marks=pytest.mark.slow), (*MIXTURE, ()), (*MIXTURE, (8,))],
)
def test_scales_start_where_they_are_asked_to(certified, density, components, layers):
    """At a latent of zeros, of which the networks make nothing but their biases; an average of k normals has 1/sqrt(k) of the
    scale, and certified networks take a tenth of it."""
    args = deep_spi.Args(transition_density=density, lipschitz_nets=certified, initial_scale=0.05, transition_layers=layers)
    transition, _ = make_world_model(args, 3)
    z, action = jnp.zeros((2, 1, 1, 16)), jnp.array([0, 2])

    @jax.jit
    def predict(key):
        params = transition.init(key, z, action)
        # but for those of the actions, which enter before the last layer
        params = jax.tree_util.tree_map_with_path(lambda path, x: x * ("action_" not in jax.tree_util.keystr(path)), params)
        predicted = transition.apply(params, z, action)
        return predicted.loc, predicted.scale

    loc, scale = predict(KEY)
    assert_array_equal(loc, 0.0)
    assert_allclose(scale, (0.1 if certified else 1.0) * 0.05 / components**0.5, rtol=1e-3)


def test_penalty_is_a_squared_directional_gradient():
    """On average the mean square of the singular values of the full Jacobian of locations and scales."""
    module = unconstrained.Transition(3, "normal", activation="tanh")
    z, action = jax.random.normal(KEY, (2, 2, 2, 16)), jnp.array([0, 2])
    params = jax.jit(module.init)(jax.random.key(1), z, action)

    @jax.jit
    def jacobians(params):
        f = partial(module.apply, params, action=action)
        flat = lambda x, n: jnp.concatenate([y[n].ravel() for y in jax.tree.leaves(f(z.at[n].set(x)))])  # noqa: E731
        return [jax.jacobian(flat)(z[n], n) for n in range(2)]

    @jax.jit
    def penalties(params, keys):
        f = partial(module.apply, params, action=action)
        return tuple(jax.vmap(lambda k, wgan=wgan: gradient_penalty(f, z, k, wgan))(keys) for wgan in (False, True))

    plain, wgan = jax.device_get(penalties(params, jax.random.split(jax.random.key(2), 2000)))
    for n, jacobian in enumerate(jacobians(params)):
        values = np.linalg.svd(np.asarray(jacobian).reshape(2 * 64, -1), compute_uv=False)
        assert_allclose(plain[:, n].mean(), np.mean(values**2), rtol=0.05)
        assert plain[:, n].max() <= 2 * values[0] ** 2 * (1 + 1e-4)  # twice as many outputs as inputs
    assert_allclose(wgan, (np.sqrt(plain) - 1) ** 2, atol=1e-5)


def test_penalty_and_its_gradient_by_finite_differences():
    """Of a scalar function, whose only directions are +1 and -1, in double precision."""
    rng = np.random.default_rng(3)
    z, w, h = rng.normal(size=(3, 4)), rng.normal(size=(4, 4)), 1e-6
    f = lambda w, z, np=jnp: np.sum(np.tanh(z @ w) * np.arange(1.0, 5.0), axis=1)  # noqa: E731
    gradients = np.stack([(f(w, z + h * e, np) - f(w, z - h * e, np)) / (2 * h) for e in np.eye(4)], axis=1)
    step = np.zeros((4, 4))
    step[1, 2] = h
    with jax.enable_x64(True):

        @jax.jit
        def penalty(w, z):
            of = lambda w, z, wgan: gradient_penalty(partial(f, w), z, jax.random.key(5), wgan)  # noqa: E731
            slopes = jax.grad(lambda w: of(w, z, True).sum())(w), jax.grad(lambda z: of(w, z, False).sum())(z)
            return of(w, z, True), slopes

        found, (slope, none) = jax.device_get(penalty(w, z))
        assert found.dtype == np.float64
        assert_allclose(found, (np.linalg.norm(gradients, axis=1) - 1) ** 2, rtol=1e-6)
        differences = (penalty(w + step, z)[0].sum() - penalty(w - step, z)[0].sum()) / (2 * h)
        assert_allclose(slope[1, 2], differences, rtol=1e-6)
        assert not none.any()


def test_categorical_encoder_is_one_hot_with_the_gradient_of_the_softmax():
    obs = jax.random.normal(KEY, (3, 10))
    module = Encoder(latent="categorical", num_categories=6, num_classes=5)
    params = jax.jit(module.init)(KEY, obs)
    weights = jax.random.normal(KEY, (3, 6, 5))

    @jax.jit
    def gradients(params):
        features = Encoder().apply({"params": {k: v for k, v in params["params"].items() if k != "code"}}, obs).reshape(3, -1)

        def relaxed(code):
            return jnp.sum(weights * jax.nn.softmax((features @ code["kernel"] + code["bias"]).reshape(3, 6, 5)))

        straight = lambda code: jnp.sum(weights * module.apply({"params": params["params"] | {"code": code}}, obs))  # noqa: E731
        code = params["params"]["code"]
        return module.apply(params, obs), jax.grad(straight)(code)["kernel"], jax.grad(relaxed)(code)["kernel"]

    z, found, expected = gradients(params)
    assert z.shape == (3, 6, 5)
    assert_array_equal(np.sort(z, axis=-1), np.broadcast_to([0, 0, 0, 0, 1], (3, 6, 5)))
    assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


def test_transformer_is_causal_and_hears_the_action():
    module = transformer.Transition(3)
    z = np.eye(4, dtype=np.float32)[np.random.default_rng(0).integers(0, 4, (1, 6))]
    params = drawn(jax.eval_shape(module.init, KEY, z, jnp.array([0])))
    logits = jax.jit(lambda z, a: module.apply(params, z, a).logits[0])
    changed = z.copy()
    changed[0, 3] = np.roll(z[0, 3], 1)
    before, after, other = logits(z, jnp.array([0])), logits(changed, jnp.array([0])), logits(z, jnp.array([1]))
    moved = np.abs(before - after).max(axis=1)
    assert not moved[:3].any() and (moved[3:] > 1e-4).all()
    assert (np.abs(before - other).max(axis=1) > 1e-4).all()


def test_soft_mixture_of_experts_slot_by_slot():
    layer = softmoe.SoftMoE(experts=2, slots=3, hidden=7, activation="relu")
    x = jax.random.normal(KEY, (2, 5, 4))
    params = jax.jit(layer.init)(jax.random.key(1), x)
    found = np.asarray(jax.jit(layer.apply)(params, x))
    p = jax.tree.map(np.asarray, params["params"])
    for n in range(2):
        tokens = np.asarray(x[n])
        affinity = np.exp(tokens @ p["routing"])
        slots = []
        for s in range(6):
            read = sum(affinity[v, s] / affinity[:, s].sum() * tokens[v] for v in range(5))
            slots.append(np.maximum(read @ p["up"][s // 3], 0) @ p["down"][s // 3])
        expected = [sum(affinity[v, s] / affinity[v].sum() * slots[s] for s in range(6)) for v in range(5)]
        assert_allclose(found[n], expected, atol=1e-5)


@pytest.fixture(scope="module")
def pong():
    """Steps of random play in Pong, some of which scored: obs, action, reward, next obs."""
    env = make_pool("Pong-v5", 16, 1)
    state, obs = env.reset()
    step, steps = jax.jit(env.step), []
    for t in range(60):
        action = jax.random.randint(jax.random.fold_in(KEY, t), (16,), 0, env.num_actions)
        state, after = step(state, action)
        steps.append((obs, action, after.reward, after.obs))
        obs = after.obs
    obs, action, reward, next_obs = (jnp.concatenate(x) for x in zip(*steps[-16:], strict=True))
    chosen = jnp.argsort(-jnp.abs(reward))[:12]
    assert reward[chosen].any()
    return obs[chosen], action[chosen], reward[chosen], next_obs[chosen]


@pytest.fixture(scope="module")
def stored_batch(pong):
    """The same as latents of an untrained encoder, of either kind."""
    obs, action, reward, next_obs = pong
    batches = {}
    for latent in ("continuous", "categorical"):
        encoder = Encoder(latent=latent)
        params = jax.jit(encoder.init)(KEY, obs)
        batches[latent] = encoder.apply(params, obs), action, reward, encoder.apply(params, next_obs)
    return batches


@pytest.fixture(scope="module")
def small_batch():
    """Smaller latents, of noise: what comes next, and the reward, follow from latent and action."""
    rng = np.random.default_rng(0)
    action = rng.integers(6, size=12)
    reward = np.sign(action - 2.5).astype(np.float32)
    continuous = np.maximum(rng.normal(size=(12, 3, 3, 16)), 0.0).astype(np.float32)
    categorical = np.eye(4, dtype=np.float32)[rng.integers(4, size=(12, 5))]
    batches = {"continuous": continuous, "categorical": categorical}
    return {k: tuple(map(jnp.asarray, (z, action, reward, np.roll(z, 1, axis=1)))) for k, z in batches.items()}


@pytest.mark.parametrize("batch, flags", QUICK_AND_ALL, ids=lambda x: x if isinstance(x, str) else name(x))
def test_losses_fall_on_a_fixed_batch_when_only_the_world_model_learns(batch, flags, request):
    args = deep_spi.Args(**flags)
    check_flags(args)
    z, action, reward, next_z = request.getfixturevalue(batch)[args.latent]
    transition, reward_network = make_world_model(args, 6)
    params = jax.jit(lambda key: (transition.init(key, z, action), reward_network.init(key, z, action)))(KEY)
    optimizer = optax.adam(3e-3)

    def loss_fn(params, key):
        predict = [partial(m.apply, p, action=action) for m, p in zip((transition, reward_network), params, strict=True)]
        losses = [
            transition_loss(predict[0](z), next_z, key, args).mean(),
            smooth_l1_loss(predict[1](z) - reward).mean(),
        ]
        if penalizes_gradients(args):
            losses.append(args.lambda_gp * sum(gradient_penalty(f, z, key, args.use_wgan_gp).mean() for f in predict))
        return sum(losses), jnp.stack(losses)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, opt_state = carry
            grads, losses = jax.grad(loss_fn, has_aux=True)(params, key)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), losses

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(KEY, 150))[1]

    losses = np.asarray(train(params))
    assert np.isfinite(losses).all()
    first, last = losses[0], losses[-10:].mean(axis=0)
    assert (last[:2] < 0.5 * first[:2]).all(), (first, last)
    assert last.sum() < 0.5 * first.sum()


def train_a_little(script, env_id, flags):
    args = script.Args(env_id=env_id, num_envs=4, num_steps=4, num_minibatches=2, total_timesteps=48, fc_layers=(32,), **flags)
    check_flags(args)
    env = make_pool(args.env_id, 4, 1)
    agent, optimizer = script.make_agent(args, env.num_actions, env.obs_parts), script.make_optimizer(args)
    state = script.init_state(args, env, agent, optimizer)
    iteration = make_iteration(script, env, agent, optimizer, args)
    for _ in range(3):
        state, metrics = iteration(state)
        losses = {k: float(v) for k, v in metrics.items() if k.startswith("losses/")}
        assert np.isfinite(list(losses.values())).all(), losses
        assert losses["losses/transition_loss"] > 0
        assert ("losses/gradient_penalty" in losses) == penalizes_gradients(args)


@pytest.mark.parametrize(
    "env_id, flags",
    [
        ("CartPole-v1", {"transition_density": "deterministic", "lipschitz_nets": False}),
        ("CartPole-v1", UNCONSTRAINED),
        ("Pong-v5", QUICK[-1]),
    ],
)
@pytest.mark.slow
def test_trains(env_id, flags):
    train_a_little(deep_mdp, env_id, flags)


@pytest.mark.slow
@pytest.mark.parametrize("script", [deep_mdp, deep_spi])
@pytest.mark.parametrize("flags", CONTINUOUS + CATEGORICAL, ids=name)
def test_every_world_model_trains_on_pong(script, flags):
    train_a_little(script, "Pong-v5", flags)


def test_the_encoder_is_chosen_by_the_shape_of_an_observation():
    """Frames, grids, vectors; what is none of them is refused, not misread."""
    encoder = make_encoder(deep_spi.Args())
    shapes = {
        (4, 84, 84): (7, 7, 64),
        (1, 36, 40): (1, 1, 64),
        (84, 84, 3): (7, 7, 64),
        (4, 64, 32): (4, 1, 64),
        (10, 10, 7): (1, 1, 128),
        (5, 31, 3): (1, 1, 128),
        (4,): (1, 1, 64),
    }
    for obs, z in shapes.items():
        assert jax.eval_shape(lambda o: encoder.init_with_output(KEY, o)[0], jnp.zeros((2, *obs), jnp.uint8)).shape == (2, *z)
    for obs in ((84, 20, 3), (1, 31, 40), (2, 10, 4)):
        with pytest.raises(ValueError, match="must be frames"):
            encoder.init(KEY, jnp.zeros((2, *obs), jnp.uint8))


def test_squashed_rewards_stay_within_one():
    args = deep_spi.Args(clip_reward_net_output=True)
    z, action = 100 * jax.random.normal(KEY, (8, 2, 2, 32)), jnp.zeros(8, jnp.int32)
    _, reward = make_world_model(args, 3)
    _, plain = make_world_model(deep_spi.Args(), 3)
    params = jax.jit(reward.init)(KEY, z, action)

    @jax.jit
    def both(params):
        return reward.apply(params, z, action), jnp.tanh(plain.apply({"params": params["params"]["reward"]}, z, action))

    found, expected = both(params)
    assert_allclose(found, expected)
    assert np.abs(expected).max() > 0.9


def test_coefficients_of_the_official_code_convert_as_the_docs_say():
    """Its deterministic loss is a mean over the latent, its L2 of codes Huber's over the number of variables, its Hamming
    distance a mean over them; by the factors of docs/differences.md all are ours."""
    rng = np.random.default_rng(0)
    z, next_z = (jnp.asarray(rng.normal(size=(3, 7, 7, 64)), jnp.float32) for _ in range(2))
    error = np.asarray(z - next_z, np.float64)
    huber = lambda e: np.where(np.abs(e) < 1, 0.5 * e**2, np.abs(e) - 0.5)  # noqa: E731
    args = deep_spi.Args(transition_density="deterministic")
    theirs = huber(error).mean(axis=(1, 2, 3))
    assert_allclose(transition_loss(Deterministic(z), next_z, KEY, args) / 3136, theirs, rtol=1e-5)
    assert_allclose(1 / 3136, 3.19e-4, rtol=1e-3)

    codes = jnp.asarray(np.eye(32, dtype=np.float32)[rng.integers(32, size=(3, 32))])
    predicted = Categorical(jnp.asarray(5 * rng.normal(size=(3, 32, 32)) + 20 * codes, jnp.float32))  # right now and then
    sampled = np.asarray(predicted.sample(KEY))
    differ = (sampled.argmax(-1) != np.asarray(codes).argmax(-1)).astype(float)
    assert 0 < differ.mean() < 1
    args = deep_spi.Args(latent="categorical")
    theirs = huber(sampled - np.asarray(codes)).sum(axis=(1, 2)) / 32
    assert_allclose(transition_loss(predicted, codes, KEY, args) / 64, theirs, rtol=1e-5)
    args = deep_spi.Args(latent="categorical", categorical_cost="hamming")
    assert_allclose(transition_loss(predicted, codes, KEY, args) / 32, differ.mean(axis=1), rtol=1e-5)
