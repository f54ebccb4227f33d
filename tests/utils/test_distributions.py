"""Distributions and elementary losses against numbers computed otherwise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import special, stats

from networks.convolution import conv2d
from networks.lipschitz import LipschitzConv, group_sort, orthogonal, projection, shifting_kernel
from networks.per_action import groups
from networks.world_models import lipschitz as certified
from networks.world_models import unconstrained
from utils.distributions import (
    MIN_SCALE,
    Categorical,
    Deterministic,
    Normal,
    average_scale,
    clipped_normal,
    positive_scale,
    soft_mixture,
    straight_through,
)
from utils.losses import masked_mean, masked_normalize, smooth_l1_loss, weighted_quantiles

KEY = jax.random.key(0)
GROUPS = 16  # of the maps below


def test_normal_against_scipy():
    loc, scale = jnp.array([0.5, -2.0]), jnp.array([0.3, 4.0])
    normal = Normal(loc, scale)
    x = jnp.array([0.1, 3.0])
    assert_allclose(normal.log_prob(x), stats.norm.logpdf(x, loc, scale), rtol=1e-5)
    samples = jax.vmap(normal.sample)(jax.random.split(KEY, 20_000))
    assert_allclose(samples.mean(0), normal.mean(), atol=5 * 4 / np.sqrt(20_000))
    assert_allclose(samples.std(0), scale, rtol=0.05)


def test_clipped_noise_is_bounded_and_has_no_density():
    normal = Normal(jnp.zeros(1000), jnp.full(1000, 2.0), noise_clip=1.0)
    sample = normal.sample(KEY)
    assert float(jnp.abs(sample).max()) == 2.0
    with pytest.raises(ValueError, match="no density"):
        normal.log_prob(sample)


def test_soft_mixture_is_the_average_of_component_samples():
    weights, loc, scale = jnp.array([0.5, 0.2, 0.3]), jnp.array([1.0, -1.0, 4.0]), jnp.array([0.5, 1.0, 2.0])
    mixture = soft_mixture(weights, loc, scale)
    noise = np.random.default_rng(0).normal(size=(200_000, 3))
    slow = np.sum(weights * (loc + scale * noise), axis=1)
    assert_allclose(mixture.mean(), slow.mean(), atol=0.01)
    assert_allclose(mixture.scale, slow.std(), rtol=0.01)
    assert_allclose(mixture.log_prob(jnp.array(2.0)), stats.norm.logpdf(2.0, slow.mean(), slow.std()), atol=0.05)


def test_deterministic():
    point = Deterministic(jnp.arange(3.0))
    assert_allclose(point.sample(KEY), point.mean())


@settings(deadline=None, max_examples=30)
@given(loc=st.floats(-3, 3), scale=st.floats(0.01, 3), x=st.floats(-3, 3))
def test_absolute_error_is_the_mean_of_a_folded_normal(loc, scale, x):
    d = Normal(jnp.asarray([loc], jnp.float32), jnp.asarray([scale], jnp.float32))
    expected = stats.foldnorm(abs(loc - x) / scale, scale=scale).mean()
    assert_allclose(d.absolute_error(jnp.asarray([x], jnp.float32))[0], expected, rtol=1e-4, atol=1e-5)


def test_absolute_error_by_monte_carlo():
    d = Normal(jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0]))
    x = jnp.array([1.0, -1.5])
    errors = np.abs(jax.vmap(d.sample)(jax.random.split(KEY, 100_000)) - x)
    assert_allclose(d.absolute_error(x), errors.mean(0), atol=4 * errors.std(0).max() / np.sqrt(len(errors)))
    with pytest.raises(ValueError, match="noise_clip"):
        Normal(x, x, noise_clip=1.0).absolute_error(x)


def test_categorical_against_scipy():
    logits = jax.random.normal(KEY, (3, 4))

    @jax.jit
    def draw(keys):
        d = Categorical(logits)
        drawn = jax.vmap(d.sample)(keys)
        return drawn, d.mean(), d.log_prob(drawn[0])

    drawn, mean, log_prob = jax.device_get(draw(jax.random.split(KEY, 20_000)))
    assert_array_equal(np.unique(drawn), [0, 1])
    assert (drawn.sum(-1) == 1).all()
    assert_allclose(drawn.mean(0), mean, atol=5 * 0.5 / np.sqrt(20_000))
    for v in range(3):
        law = stats.multinomial(1, special.softmax(np.asarray(logits[v], np.float64)))
        assert_allclose(log_prob[v], law.logpmf(drawn[0, v]), rtol=1e-5)


def test_straight_through_samples_have_the_gradient_of_the_probabilities():
    logits, weights = jax.random.normal(KEY, (2, 3, 4))

    @jax.jit
    def both(logits):
        through = jax.grad(lambda x: jnp.sum(weights * Categorical(x).sample(KEY)))(logits)
        return through, jax.grad(lambda x: jnp.sum(weights * jax.nn.softmax(x)))(logits), straight_through(logits, weights)

    through, expected, same = both(logits)
    assert_allclose(through, expected, rtol=1e-6)
    assert_array_equal(same, logits)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 5.0])
def test_gumbel_softmax_samples_are_codes_with_the_gradient_of_the_relaxed_ones(temperature):
    logits, weights = jax.random.normal(KEY, (2, 3, 4))

    @jax.jit
    def draw(logits):
        sample = lambda x: Categorical(x, temperature).sample(KEY)  # noqa: E731
        gradient = jax.grad(lambda x: jnp.sum(weights * sample(x)))(logits)
        noise = jax.random.gumbel(KEY, logits.shape)
        return sample(logits), Categorical(logits).sample(KEY), logits + noise, gradient

    sample, expected, noisy, found = jax.device_get(draw(logits))
    assert_array_equal(sample, expected)  # the same draw, one-hot
    assert_array_equal(sample.argmax(-1), noisy.argmax(-1))
    # by hand: y = softmax((x + g) / t) has dy_i/dx_j = (y_i (i = j) - y_i y_j) / t
    y = special.softmax(noisy.astype(np.float64) / temperature, axis=-1)
    jacobian = (np.einsum("vi,ij->vij", y, np.eye(4)) - np.einsum("vi,vj->vij", y, y)) / temperature
    assert_allclose(found, np.einsum("vi,vij->vj", weights, jacobian), rtol=1e-4, atol=1e-6)


def test_smooth_l1_by_hand():
    assert_allclose(smooth_l1_loss(jnp.array([-0.5, 0.0, 2.0])), [0.125, 0.0, 1.5])
    assert_allclose(smooth_l1_loss(jnp.array([1.0, 3.0]), beta=2.0), [0.25, 2.0])
    with pytest.raises(ValueError, match="positive"):
        smooth_l1_loss(jnp.ones(1), beta=0.0)


def test_masked_reductions_by_hand():
    x, valid = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
    assert float(masked_mean(x, valid)) == 2.0
    assert_allclose(masked_normalize(x, valid)[:2], [-1.0, 1.0])
    assert float(masked_mean(x, jnp.zeros(3, bool))) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.floats(-60, 60))
def test_positive_scale(x):
    assert_allclose(positive_scale(jnp.float32(x)), MIN_SCALE + np.logaddexp(0, x), atol=2e-7, rtol=1e-6)
    assert_allclose(jax.grad(positive_scale)(jnp.float32(x)), 1 / (1 + np.exp(-x)), atol=1e-6)


def test_average_scale_and_its_gradients_up_to_second_order():
    keys = jax.random.split(KEY, 3)
    weights, scale = jax.random.uniform(keys[0], (3, 1, 5, 1)), jax.random.uniform(keys[1], (3, 2, 5, 4))
    g = jax.random.normal(keys[2], (3, 2, 4))

    def derivatives(f, weights, scale):
        value, vjp = jax.vjp(f, weights, scale)
        first = jax.grad(lambda w, s: jnp.sum(g * f(w, s)), (0, 1))
        return value, *vjp(g), *jax.grad(lambda w, s: sum(jnp.sum(x**3) for x in first(w, s)), (0, 1))(weights, scale)

    @jax.jit
    def both(weights, scale, zeros):
        plain = lambda w, s: jnp.sqrt(jnp.sum((w * s) ** 2, 2))  # noqa: E731
        ours = lambda w, s: average_scale(w, s, 2)  # noqa: E731
        of_zeros = jax.grad(lambda s: ours(weights, s).sum())(zeros)
        return derivatives(ours, weights, scale), derivatives(plain, weights, scale), of_zeros

    actual, expected, of_zeros = both(weights, scale, jnp.zeros((3, 2, 5, 4)))
    assert_allclose(actual[0], expected[0], rtol=1e-6)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_allclose(a, e, rtol=1e-4, atol=1e-6)
    assert not np.asarray(of_zeros).any()


def test_clipped_noise_is_a_clipped_normal():
    noise = clipped_normal(KEY, (99_999,), 1.0)
    inside = np.abs(noise) < 1
    assert_allclose(inside.mean(), stats.norm.cdf(1) - stats.norm.cdf(-1), atol=5 * 0.5 / np.sqrt(99_999))
    assert abs(float(noise.mean())) < 5 * 0.72 / np.sqrt(99_999)
    assert stats.kstest(noise[inside], stats.truncnorm(-1, 1).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1:2], noise[1::2])[0, 1]) < 5 / np.sqrt(50_000)
    assert abs(np.corrcoef(noise[:49_999], noise[50_000:])[0, 1]) < 5 / np.sqrt(50_000)  # halves of the same bits


def grouped_conv(hidden, kernel):
    """lax's grouped convolution, for input channels k * G + g and output channels j * G + g; kernel [2, 2, G, c, o]."""
    n, h, w, channels = hidden.shape
    blocks = hidden.reshape(n, h, w, channels // GROUPS, GROUPS).swapaxes(-1, -2).reshape(hidden.shape)
    kernel = kernel.transpose(0, 1, 3, 2, 4).reshape(2, 2, channels // GROUPS, -1)
    dimensions = ("NHWC", "HWIO", "NHWC")
    pads = [(0, 1), (0, 1)]
    out = jax.lax.conv_general_dilated(blocks, kernel, (1, 1), pads, dimension_numbers=dimensions, feature_group_count=GROUPS)
    return out.reshape(n, h, w, GROUPS, -1).swapaxes(-1, -2).reshape(n, h, w, -1)


def all_actions_then_select(p, z, action, lipschitz, components):
    """Location and scale of the transition, every action's convolution computed in full, with its kernels written out."""
    num_actions, channels = p["bias"].shape[0], z.shape[-1]
    assert groups(channels) == GROUPS
    if lipschitz:
        hidden = group_sort(LipschitzConv(2 * channels).apply({"params": p["hidden"]}, z))
        h, *bases = (orthogonal(p[name]) for name in ("dense", "vertical", "horizontal"))
        vertical, horizontal = (projection(basis) for basis in bases)
        weights = jnp.broadcast_to(jax.nn.softmax(p["mixture"])[None], (len(z), num_actions, components))
        maps = [shifting_kernel(h[..., m, :], vertical, horizontal) for m in range(2 * components)]
        kernels = [k.transpose(4, 0, 1, 5, 2, 3) for k in maps]  # each [A, 2, 2, G, c, o]
        shares = 0.9, 0.1  # of K, those of locations and scales
    else:
        hidden = jax.nn.relu(conv2d(z, p["hidden_kernel"], padding="SAME") + p["hidden_bias"])
        logits = hidden.reshape(len(z), -1) @ p["mixture"]["kernel"] + p["mixture"]["bias"]
        weights = jax.nn.softmax(logits.reshape(len(z), num_actions, components))
        per_map = p["kernels"].reshape(num_actions, 2 * components, -1, 2, 2, 2 * channels // GROUPS, GROUPS)
        kernels = [per_map[:, m].transpose(0, 2, 3, 5, 4, 1) for m in range(2 * components)]
        shares = 1.0, 1.0
    outputs = []
    for a in range(num_actions):
        maps = jnp.stack([grouped_conv(hidden, k[a]) + p["bias"][a, m] for m, k in enumerate(kernels)])
        w = weights[:, a].T[:, :, None, None, None]
        scales = jax.nn.softplus(maps[components:]) + MIN_SCALE
        outputs.append(
            jnp.stack([shares[0] * (w * maps[:components]).sum(0), shares[1] * jnp.sqrt(((w * scales) ** 2).sum(0))])
        )
    return jnp.stack(outputs)[action, :, jnp.arange(len(z))]


@pytest.mark.parametrize("num_actions, lipschitz", [(2, True), pytest.param(18, True, marks=pytest.mark.slow), (2, False)])
def test_transition_of_the_action_taken_equals_all_actions_then_select(num_actions, lipschitz):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    z, g = normal(8, 4, 4, 32), normal(8, 2, 4, 4, 32)
    action = jnp.asarray(rng.integers(num_actions, size=8))
    module = (certified if lipschitz else unconstrained).Transition(num_actions, components=2)
    params = jax.jit(module.init)(KEY, z, action)["params"]
    params = jax.tree.map(lambda x: x + 0.3 * normal(*x.shape), params)  # biases and mixtures are not 0 here

    def fast(p, z):
        predicted = module.apply({"params": p}, z, action)
        return jnp.stack([predicted.loc, predicted.scale], axis=1)

    def value_and_gradients(f):
        @jax.jit
        def of(p, z):
            value, pull_back = jax.vjp(f, p, z)
            return value, jax.tree.leaves(pull_back(g))

        return jax.device_get(of(params, z))

    actual, gradients = value_and_gradients(fast)
    slow = lambda p, z: all_actions_then_select(p, z, action, lipschitz, module.components)  # noqa: E731
    expected, expected_gradients = value_and_gradients(slow)
    assert_allclose(actual, expected, atol=1e-5)
    for a, e in zip(gradients, expected_gradients, strict=True):
        assert_allclose(a, e, atol=2e-5 * max(1.0, np.abs(e).max()))


SHARES = 0.0625, 0.5, 0.9375  # without rounding
quantiles = jax.jit(partial(weighted_quantiles, shares=SHARES))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3)), max_size=12).filter(lambda x: any(w for _, w in x)))
def test_weighted_quantiles_are_those_of_repeated_numbers(numbers):
    x, weight = np.array(numbers, np.float32).T
    padded = np.pad([x, weight], ((0, 0), (0, 12 - len(x))))  # what has no weight changes nothing, and one program does
    found = quantiles(*padded)
    assert_allclose(found, np.quantile(np.repeat(x, weight.astype(int)), SHARES, method="inverted_cdf"))
