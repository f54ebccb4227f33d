"""The products of maps and the kernels of actions, as each platform computes them, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from networks.per_action import (
    applied,
    cpu_product,
    cpu_vector_outer_product,
    cpu_vector_product,
    gathered_vector_outer_product,
    gathered_vector_product,
    of_action,
    outer_product,
    product,
    shift,
    summed_product,
)

sizes = st.integers(1, 4)
compute = jax.jit(lambda kernels, x, y: ((cpu_product(kernels, x), summed_product(kernels, x)), outer_product(y, x)))


def slow(kernels, x):
    """The product with the kernels of each sample."""
    return jnp.einsum("nocg,nhwcg->nhwog", kernels, x, precision="highest")


def first(f):
    """Return the function that computes the gradients of a function of f."""
    return jax.grad(lambda kernels, x: jnp.sum(jnp.sin(f(kernels, x))), (0, 1))


def second(f):
    """Return the function that computes the gradients of the norm of gradients."""
    return jax.grad(lambda kernels, x: sum(jnp.sum(g**2) for g in first(f)(kernels, x)), (0, 1))


@settings(max_examples=4, deadline=None)
@given(n=sizes, h=sizes, w=sizes, o=sizes, c=sizes, groups=st.integers(1, 5))
def test_products_are_those_of_a_loop_over_samples_and_groups(n, h, w, o, c, groups):
    rng = np.random.default_rng(0)
    shapes = (n, o, c, groups), (n, h, w, c, groups), (n, h, w, o, groups)
    kernels, x, y = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    products, outer = jax.device_get(compute(kernels, x, y))
    for i in range(n):
        for g in range(groups):
            for z in products:
                assert_allclose(z[i, ..., g], x[i, ..., g] @ kernels[i, ..., g].T, atol=1e-5)
            pixels = y[i, ..., g].reshape(-1, o).T @ x[i, ..., g].reshape(-1, c)
            assert_allclose(outer[i, ..., g], pixels, atol=1e-5)


def test_products_by_group_and_their_gradients_up_to_second_order():
    rng = np.random.default_rng(0)
    shapes = (3, 2, 4, 5), (3, 2, 3, 4, 5), (3, 2, 3, 2, 5)
    kernels, x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    @jax.jit
    def all_of(kernels, x, y):
        outer = jnp.einsum("nhwog,nhwcg->nocg", y, x, precision="highest")
        ours, plain = (product(kernels, x), outer_product(y, x)), (slow(kernels, x), outer)
        return ours, plain, second(product)(kernels, x), second(slow)(kernels, x)

    actual, expected, actual_second, expected_second = jax.device_get(all_of(kernels, x, y))
    for a, e in zip(actual, expected, strict=True):
        assert_allclose(a, e, atol=1e-5)
    for a, e in zip(actual_second, expected_second, strict=True):
        assert_allclose(a, e, rtol=1e-4, atol=1e-4 * np.abs(e).max())


def test_entries_of_actions_and_their_gradients_are_those_of_indexing():
    table, action = jax.random.normal(jax.random.key(0), (4, 2, 3)), jnp.array([2, 0, 2, 2])  # one repeated, two absent
    f = lambda entries: lambda t: jnp.sum(jnp.sin(entries(t)) * jnp.arange(24.0).reshape(4, 2, 3))  # noqa: E731

    @jax.jit
    def both(table):
        ways = (lambda t: of_action(t, action)), (lambda t: t[action])
        return [(entries(table), jax.grad(f(entries))(table)) for entries in ways]

    (found, slope), (expected, expected_slope) = both(table)
    assert_array_equal(found, expected)
    assert_allclose(slope, expected_slope, rtol=1e-6)


def test_shift_by_hand_and_off_the_map():
    x = jnp.arange(1.0, 5.0).reshape(1, 2, 2, 1, 1)
    assert_array_equal(shift(x, 0, 1).ravel(), [2, 0, 4, 0])
    assert_array_equal(shift(x, 1, 0).ravel(), [3, 4, 0, 0])
    assert_array_equal(shift(x[:, :1, :1], 1, 1).ravel(), [0])


@settings(max_examples=6, deadline=None)
@given(n=st.sampled_from([1, 7, 8, 9, 40]), o=sizes, c=st.sampled_from([1, 8, 9, 20]), actions=st.integers(1, 5))
def test_vector_products_are_those_of_a_loop_over_samples(n, o, c, actions):
    rng, groups = np.random.default_rng(0), 3
    kernels, x, y = (rng.normal(size=(k, *s, groups)).astype(np.float32) for k, *s in ((actions, o, c), (n, c), (n, o)))
    action = rng.integers(0, actions, n)
    products, outers = np.zeros_like(y), np.zeros_like(kernels)
    for i in range(n):
        for g in range(groups):
            products[i, :, g] = kernels[action[i], :, :, g] @ x[i, :, g]
            outers[action[i], :, :, g] += np.outer(y[i, :, g], x[i, :, g])
    for way in (cpu_vector_product, gathered_vector_product):
        assert_allclose(jax.jit(way)(kernels, action, x), products, atol=1e-5)
    for way in (cpu_vector_outer_product, gathered_vector_outer_product):
        assert_allclose(jax.jit(way, static_argnums=3)(y, action, x, actions), outers, atol=1e-5)


def test_gradients_of_every_order_are_those_of_the_kernels_of_each_sample():
    rng = np.random.default_rng(0)
    kernels, x = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 5, 9, 3), (20, 1, 1, 9, 3)))
    action = jnp.asarray(rng.integers(0, 3, 20))  # one action is never taken
    derivatives = jax.jit(lambda f, kernels, x: (first(f)(kernels, x), second(f)(kernels, x)), static_argnums=0)
    ours = derivatives(lambda kernels, x: applied(kernels, action, x), kernels, x)
    plain = derivatives(lambda kernels, x: slow(kernels[action], x), kernels, x)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), ours, plain)
    for of_kernels, _ in ours:
        assert np.all(of_kernels[3] == 0)
