"""Distributions and elementary losses against numbers computed otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from networks.world_model import per_action_conv, softplus
from utils.distributions import Deterministic, Normal, soft_mixture
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


@pytest.mark.parametrize("num_actions", [4, 18])
def test_gathered_transition_equals_all_actions_then_select(num_actions):
    n, groups, c, o = 12, 4, 2, 3
    keys = jax.random.split(KEY, 4)
    x = jax.random.normal(keys[0], (n, 7, 7, c * groups))
    kernels = jax.random.normal(keys[1], (num_actions, 2, 2, groups, c, o))
    action = jax.random.randint(keys[2], (n,), 0, num_actions)

    def all_then_select(x, kernels):
        def one(kernel):  # [2, 2, G, c, o] as a grouped convolution of lax, whose groups are blocks of channels
            blocks = x.reshape(n, 7, 7, c, groups).swapaxes(-1, -2).reshape(x.shape)
            kernel = kernel.transpose(0, 1, 3, 2, 4).reshape(2, 2, c, groups * o)
            y = jax.lax.conv_general_dilated(
                blocks, kernel, (1, 1), [(0, 1), (0, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
            )
            return y.reshape(n, 49, groups, o).transpose(0, 2, 3, 1)

        return jax.vmap(one)(kernels)[action, jnp.arange(n)]

    expected, expected_vjp = jax.vjp(all_then_select, x, kernels)
    actual, actual_vjp = jax.vjp(lambda x, kernels: per_action_conv(x, kernels, action), x, kernels)
    assert_allclose(actual, expected, atol=1e-5)
    g = jax.random.normal(keys[3], expected.shape)
    for a, e in zip(actual_vjp(g), expected_vjp(g), strict=True):
        assert_allclose(a, e, atol=1e-5 * max(1.0, float(jnp.abs(e).max())))
