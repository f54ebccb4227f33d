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
from envs.atari import make_pool
from networks.architectures import ACTIVATIONS, Encoder, make_encoder
from networks.world_models import CATEGORICAL as WORLD_MODELS
from networks.world_models import make_world_model, softmoe, transformer, unconstrained
from tests.probes import make_iteration
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
    {"latent": "categorical", "world_model": "transformer", "categorical_cost": "hamming", "use_gumbel_softmax": True},
    {"latent": "categorical", "world_model": "softmoe", "categorical_cost": "hamming"},
]
assert all(flags in CONTINUOUS + CATEGORICAL for flags in [UNCONSTRAINED, *QUICK])
ALL = [flags if flags in QUICK else pytest.param(flags, marks=pytest.mark.slow) for flags in CONTINUOUS + CATEGORICAL]
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
    certain = Categorical(jnp.array([[[50.0, 0.0], [0.0, 50.0]]]))
    next_z = codes([0, 0], count=2)
    cost = lambda name, predicted=certain: CATEGORICAL_COSTS[name].distance(predicted, next_z, KEY)[0]  # noqa: E731
    assert_allclose(cost("hamming"), [0, 1], atol=1e-6)
    assert_allclose(cost("l2"), [0, 2], atol=1e-6)
    assert_allclose(cost("cross_entropy"), [0, 50], atol=1e-5)
    assert_allclose(cost("jensen_shannon"), [0, np.sqrt(np.log(2))], atol=1e-4)
    even = Categorical(jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]]])))
    assert_allclose(cost("cross_entropy", even), -np.log([0.25, 0.5]), rtol=1e-6)
    assert_allclose(cost("jensen_shannon", even)[1], distance.jensenshannon([0.5, 0.5], [1, 0]), rtol=1e-4)


probabilities = (
    st.lists(st.floats(0, 1), min_size=32, max_size=32).filter(lambda p: sum(p) > 1e-3).map(lambda p: np.array(p) / sum(p))
)


@settings(deadline=None, max_examples=50)
@given(p=probabilities, q=probabilities)
def test_jensen_shannon_is_a_bounded_symmetric_distance(p, q):
    f = lambda p, q: jensen_shannon_distance(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))  # noqa: E731
    assert_allclose(f(p, q) ** 2, distance.jensenshannon(p, q) ** 2, atol=3e-6)
    assert f(p, q) == f(q, p)
    assert f(p, p) == 0
    assert f(p, q) <= np.sqrt(np.log(2)) + 1e-6
    for gradient in jax.grad(jensen_shannon_distance, argnums=(0, 1))(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)):
        assert bool(jnp.isfinite(gradient).all())


def test_jensen_shannon_pulls_disjoint_distributions_together():
    p, q = codes(0, 1)
    assert_allclose(jensen_shannon_distance(p, q), np.sqrt(np.log(2)), rtol=1e-5)
    gradient = jax.grad(jensen_shannon_distance)(p, q)
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
    assert_allclose(balanced(logits, other), plain(logits, other), rtol=1e-6)
    expected = jax.grad(written_out, argnums=(0, 1))(logits, other)
    for a, b in zip(jax.grad(balanced, argnums=(0, 1))(logits, other), expected, strict=True):
        assert_allclose(a, b, atol=1e-6)
    assert_array_equal(scale_gradient(logits, 0.3), logits)


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
        assert network.init_with_output(KEY, z, jnp.zeros(2, jnp.int32))[0].noise_clip == clip


@pytest.mark.parametrize("layers", [(), (8,)])
@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("density, components", [("normal", 1), ("mixture_normal", 5)])
def test_scales_start_where_they_are_asked_to(certified, density, components, layers):
    """At a latent of zeros, of which the networks make nothing but their biases; an average of k normals has 1/sqrt(k) of the
    scale, and certified networks take a tenth of it."""
    args = deep_spi.Args(transition_density=density, lipschitz_nets=certified, initial_scale=0.05, transition_layers=layers)
    transition, _ = make_world_model(args, 3)
    z, action = jnp.zeros((2, 1, 1, 16)), jnp.array([0, 2])
    params = transition.init(KEY, z, action)
    # but for those of the actions, which enter before the last layer
    params = jax.tree_util.tree_map_with_path(lambda path, x: x * ("action_" not in jax.tree_util.keystr(path)), params)
    predicted = transition.apply(params, z, action)
    assert_array_equal(predicted.loc, 0.0)
    assert_allclose(predicted.scale, (0.1 if certified else 1.0) * 0.05 / components**0.5, rtol=1e-3)


def test_penalty_is_a_squared_directional_gradient():
    """On average the mean square of the singular values of the full Jacobian of locations and scales."""
    module = unconstrained.Transition(3, "normal", activation="tanh")
    z, action = jax.random.normal(KEY, (2, 2, 2, 16)), jnp.array([0, 2])
    f = partial(module.apply, module.init(jax.random.key(1), z, action), action=action)
    flat = lambda x, n: jnp.concatenate([y[n].ravel() for y in jax.tree.leaves(f(z.at[n].set(x)))])  # noqa: E731
    jacobians = [np.asarray(jax.jacobian(flat)(z[n], n)).reshape(2 * 64, -1) for n in range(2)]
    keys = jax.random.split(jax.random.key(2), 4000)
    penalties = jax.jit(jax.vmap(lambda k: gradient_penalty(f, z, k, False)))(keys)
    for n, jacobian in enumerate(jacobians):
        values = np.linalg.svd(jacobian, compute_uv=False)
        assert_allclose(penalties[:, n].mean(), np.mean(values**2), rtol=0.05)
        assert penalties[:, n].max() <= 2 * values[0] ** 2 * (1 + 1e-4)  # twice as many outputs as inputs
    wgan = jax.jit(jax.vmap(lambda k: gradient_penalty(f, z, k, True)))(keys[:10])
    assert_allclose(wgan, (np.sqrt(penalties[:10]) - 1) ** 2, atol=1e-5)


def test_penalty_and_its_gradient_by_finite_differences():
    """Of a scalar function, whose only directions are +1 and -1, in double precision."""
    with jax.enable_x64(True):
        z = jax.random.normal(jax.random.key(3), (3, 4))
        w = jax.random.normal(jax.random.key(4), (4, 4))
        f = lambda w, z: jnp.sum(jnp.tanh(z @ w) * jnp.arange(1.0, 5.0), axis=1)  # noqa: E731
        penalty = lambda w: gradient_penalty(partial(f, w), z, jax.random.key(5), True)  # noqa: E731
        h = 1e-6
        units = np.eye(4)
        gradients = np.stack([(f(w, z + h * e) - f(w, z - h * e)) / (2 * h) for e in units], axis=1)
        assert_allclose(penalty(w), (np.linalg.norm(gradients, axis=1) - 1) ** 2, rtol=1e-6)
        step = jnp.zeros((4, 4)).at[1, 2].set(h)
        slope = (penalty(w + step).sum() - penalty(w - step).sum()) / (2 * h)
        assert_allclose(jax.grad(lambda w: penalty(w).sum())(w)[1, 2], slope, rtol=1e-6)
        assert not jax.grad(lambda z: gradient_penalty(partial(f, w), z, jax.random.key(5), False).sum())(z).any()


def test_categorical_encoder_is_one_hot_with_the_gradient_of_the_softmax():
    obs = jax.random.randint(KEY, (3, 4, 84, 84), 0, 255).astype(jnp.uint8)
    module = Encoder(latent="categorical", num_categories=6, num_classes=5)
    params = module.init(KEY, obs)
    z = module.apply(params, obs)
    assert z.shape == (3, 6, 5)
    assert_array_equal(np.sort(z, axis=-1), np.broadcast_to([0, 0, 0, 0, 1], (3, 6, 5)))
    weights = jax.random.normal(KEY, z.shape)
    features = Encoder().apply({"params": {k: v for k, v in params["params"].items() if k != "code"}}, obs).reshape(3, -1)

    def relaxed(code):
        return jnp.sum(weights * jax.nn.softmax((features @ code["kernel"] + code["bias"]).reshape(3, 6, 5)))

    straight = lambda code: jnp.sum(weights * module.apply({"params": params["params"] | {"code": code}}, obs))  # noqa: E731
    code = params["params"]["code"]
    assert_allclose(jax.grad(straight)(code)["kernel"], jax.grad(relaxed)(code)["kernel"], atol=1e-5)


def test_transformer_is_causal_and_hears_the_action():
    module = transformer.Transition(3)
    z = codes(*jax.random.randint(KEY, (1, 6), 0, 4))
    params = module.init(KEY, z, jnp.array([0]))
    logits = lambda z, a: module.apply(params, z, jnp.array([a])).logits[0]  # noqa: E731
    changed = z.at[0, 3].set(jnp.roll(z[0, 3], 1))
    moved = jnp.abs(logits(z, 0) - logits(changed, 0)).max(axis=1)
    assert not moved[:3].any() and (moved[3:] > 1e-4).all()
    assert (jnp.abs(logits(z, 0) - logits(z, 1)).max(axis=1) > 1e-4).all()


def test_soft_mixture_of_experts_slot_by_slot():
    layer = softmoe.SoftMoE(experts=2, slots=3, hidden=7, activation="relu")
    x = jax.random.normal(KEY, (2, 5, 4))
    params = layer.init(jax.random.key(1), x)
    p = jax.tree.map(np.asarray, params["params"])
    for n in range(2):
        tokens = np.asarray(x[n])
        affinity = np.exp(tokens @ p["routing"])
        slots = []
        for s in range(6):
            read = sum(affinity[v, s] / affinity[:, s].sum() * tokens[v] for v in range(5))
            slots.append(np.maximum(read @ p["up"][s // 3], 0) @ p["down"][s // 3])
        expected = [sum(affinity[v, s] / affinity[v].sum() * slots[s] for s in range(6)) for v in range(5)]
        assert_allclose(layer.apply(params, x)[n], expected, atol=1e-5)


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


@pytest.mark.parametrize("flags", ALL, ids=name)
def test_losses_fall_on_a_fixed_batch_when_only_the_world_model_learns(flags, stored_batch):
    args = deep_spi.Args(**flags)
    check_flags(args)
    z, action, reward, next_z = stored_batch[args.latent]
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
    agent, optimizer = script.make_agent(args, env.num_actions), script.make_optimizer(args)
    state = script.init_state(args, env, agent, optimizer)
    iteration = make_iteration(script, env, agent, optimizer, args)
    for _ in range(3):
        state, metrics = iteration(state)
        losses = {k: float(v) for k, v in metrics.items() if k.startswith("losses/")}
        assert np.isfinite(list(losses.values())).all(), losses
        assert losses["losses/transition_loss"] > 0
        assert ("losses/gradient_penalty" in losses) == penalizes_gradients(args)


@pytest.mark.parametrize(
    "env_id, flags", [("CartPole-v1", UNCONSTRAINED), pytest.param("Pong-v5", QUICK[-1], marks=pytest.mark.slow)]
)
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
        (10, 10, 7): (1, 1, 128),
        (5, 35, 3): (1, 1, 128),
        (4,): (1, 1, 64),
    }
    for obs, z in shapes.items():
        assert jax.eval_shape(lambda o: encoder.init_with_output(KEY, o)[0], jnp.zeros((2, *obs), jnp.uint8)).shape == (2, *z)
    for obs in ((84, 84, 3), (1, 32, 32), (2, 10, 4)):
        with pytest.raises(ValueError, match="must be frames"):
            encoder.init(KEY, jnp.zeros((2, *obs), jnp.uint8))


def test_squashed_rewards_stay_within_one():
    args = deep_spi.Args(clip_reward_net_output=True)
    z, action = 100 * jax.random.normal(KEY, (8, 2, 2, 32)), jnp.zeros(8, jnp.int32)
    _, reward = make_world_model(args, 3)
    _, plain = make_world_model(deep_spi.Args(), 3)
    params = reward.init(KEY, z, action)
    expected = jnp.tanh(plain.apply({"params": params["params"]["reward"]}, z, action))
    assert_allclose(reward.apply(params, z, action), expected)
    assert jnp.abs(expected).max() > 0.9


def test_coefficients_of_the_official_code_convert_as_the_docs_say():
    """Its deterministic loss is a mean over the latent, its L2 of codes Huber's over the number of variables, its Hamming
    distance a mean over them; by the factors of docs/differences.md all are ours."""
    z, next_z = (jax.random.normal(key, (3, 7, 7, 64)) for key in jax.random.split(KEY))
    error = np.asarray(z - next_z, np.float64)
    huber = lambda e: np.where(np.abs(e) < 1, 0.5 * e**2, np.abs(e) - 0.5)  # noqa: E731
    args = deep_spi.Args(transition_density="deterministic")
    theirs = huber(error).mean(axis=(1, 2, 3))
    assert_allclose(transition_loss(Deterministic(z), next_z, KEY, args) / 3136, theirs, rtol=1e-5)
    assert_allclose(1 / 3136, 3.19e-4, rtol=1e-3)

    codes = jax.nn.one_hot(jax.random.randint(KEY, (3, 32), 0, 32), 32)
    predicted = Categorical(5 * jax.random.normal(KEY, (3, 32, 32)) + 20 * codes)  # right now and then
    sampled = np.asarray(predicted.sample(KEY))
    differ = (sampled.argmax(-1) != np.asarray(codes).argmax(-1)).astype(float)
    assert 0 < differ.mean() < 1
    args = deep_spi.Args(latent="categorical")
    theirs = huber(sampled - np.asarray(codes)).sum(axis=(1, 2)) / 32
    assert_allclose(transition_loss(predicted, codes, KEY, args) / 64, theirs, rtol=1e-5)
    args = deep_spi.Args(latent="categorical", categorical_cost="hamming")
    assert_allclose(transition_loss(predicted, codes, KEY, args) / 32, differ.mean(axis=1), rtol=1e-5)
