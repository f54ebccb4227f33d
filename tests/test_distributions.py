"""Distributions and elementary losses against numbers computed otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from networks.lipschitz import shifting_kernel
from networks.world_model import GROUPS, by_group, product, shift, softplus
from utils.distributions import Deterministic, Normal, average_scale, clipped_normal, soft_mixture
from utils.losses import masked_mean, masked_normalize, smooth_l1_loss

KEY = jax.random.key(0)


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
def test_softplus(x):
    assert_allclose(softplus(jnp.float32(x)), np.logaddexp(0, x), atol=2e-7, rtol=1e-6)
    assert_allclose(jax.grad(softplus)(jnp.float32(x)), 1 / (1 + np.exp(-x)), atol=1e-6)


def test_average_scale_and_its_gradient():
    keys = jax.random.split(KEY, 3)
    weights, scale = jax.random.uniform(keys[0], (3, 1, 5, 1)), jax.random.uniform(keys[1], (3, 2, 5, 4))
    expected, expected_vjp = jax.vjp(lambda w, s: jnp.sqrt(jnp.sum((w * s) ** 2, 2)), weights, scale)
    actual, actual_vjp = jax.vjp(lambda w, s: average_scale(w, s, 2), weights, scale)
    assert_allclose(actual, expected, rtol=1e-6)
    g = jax.random.normal(keys[2], expected.shape)
    for a, e in zip(actual_vjp(g), expected_vjp(g), strict=True):
        assert_allclose(a, e, rtol=1e-4, atol=1e-6)
    zeros = jax.grad(lambda s: average_scale(weights, s, 2).sum())(jnp.zeros_like(scale))
    assert not zeros.any()


def test_clipped_noise_is_a_clipped_normal():
    noise = clipped_normal(KEY, (99_999,), 1.0)
    inside = np.abs(noise) < 1
    assert_allclose(inside.mean(), stats.norm.cdf(1) - stats.norm.cdf(-1), atol=5 * 0.5 / np.sqrt(99_999))
    assert abs(float(noise.mean())) < 5 * 0.72 / np.sqrt(99_999)
    assert stats.kstest(noise[inside], stats.truncnorm(-1, 1).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1:2], noise[1::2])[0, 1]) < 5 / np.sqrt(50_000)
    assert abs(np.corrcoef(noise[:49_999], noise[50_000:])[0, 1]) < 5 / np.sqrt(50_000)  # halves of the same bits


@pytest.mark.parametrize("num_actions", [4, 18])
def test_gathered_transition_equals_all_actions_then_select(num_actions):
    """The certified second convolution: factor by factor for the action taken, and as one kernel for each of all actions."""
    n, c, o, side = 12, 8, 4, 7
    keys = jax.random.split(KEY, 6)
    hidden = jax.random.normal(keys[0], (n, side, side, c * GROUPS))
    shapes = ((num_actions, GROUPS, o, c), (num_actions, GROUPS, c, c), (num_actions, GROUPS, c, c))
    factors = [jax.random.normal(k, s) / 3 for k, s in zip(keys[1:], shapes, strict=False)]
    action = jax.random.randint(keys[4], (n,), 0, num_actions)

    def factored(hidden, h, p, q):
        x = by_group(hidden)
        x = x + product(q, shift(x, side, 0, 1) - x, action)
        x = x + product(p, shift(x, side, 1, 0) - x, action)
        return product(h, x, action)

    def all_then_select(hidden, h, p, q):
        # [2, 2, c, o, A, G]: as matrices that act on rows, so each factor is transposed
        kernels = shifting_kernel(*(jnp.transpose(f, (3, 2, 0, 1)) for f in (h, p, q)))

        def one(kernel):  # a grouped convolution of lax: blocks of input channels, blocks of output channels
            kernel = kernel.transpose(0, 1, 2, 4, 3).reshape(2, 2, c, GROUPS * o)
            y = jax.lax.conv_general_dilated(
                hidden, kernel, (1, 1), [(0, 1), (0, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=GROUPS
            )
            return y.reshape(n, side * side, GROUPS, o).transpose(0, 2, 3, 1)

        return jax.vmap(one, in_axes=4)(kernels)[action, jnp.arange(n)]

    expected, expected_vjp = jax.vjp(all_then_select, hidden, *factors)
    actual, actual_vjp = jax.vjp(factored, hidden, *factors)
    assert_allclose(actual, expected, atol=1e-5)
    g = jax.random.normal(keys[5], expected.shape)
    for a, e in zip(actual_vjp(g), expected_vjp(g), strict=True):
        assert_allclose(a, e, atol=1e-5 * max(1.0, float(jnp.abs(e).max())))
