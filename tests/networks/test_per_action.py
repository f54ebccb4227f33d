"""The products of maps and the kernels of actions, as each platform computes them."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from networks.per_action import (
    applied,
    cpu_product,
    cpu_vector_outer_product,
    cpu_vector_product,
    gathered_vector_outer_product,
    gathered_vector_product,
    outer_product,
    summed_product,
)

sizes = st.integers(1, 4)
compute = jax.jit(lambda kernels, x, y: ((cpu_product(kernels, x), summed_product(kernels, x)), outer_product(y, x)))


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
    for product in (cpu_vector_product, gathered_vector_product):
        assert_allclose(jax.jit(product)(kernels, action, x), products, atol=1e-5)
    for outer in (cpu_vector_outer_product, gathered_vector_outer_product):
        assert_allclose(jax.jit(outer, static_argnums=3)(y, action, x, actions), outers, atol=1e-5)


def test_gradients_of_every_order_are_those_of_the_kernels_of_each_sample():
    rng = np.random.default_rng(0)
    kernels, x = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 5, 9, 3), (20, 1, 1, 9, 3)))
    action = jnp.asarray(rng.integers(0, 3, 20))  # one action is never taken

    def derivatives(f):
        first = jax.grad(lambda kernels, x: jnp.sum(jnp.sin(f(kernels, x))), (0, 1))
        second = jax.grad(lambda kernels, x: sum(jnp.sum(g**3) for g in first(kernels, x)), (0, 1))
        return jax.jit(lambda: (first(kernels, x), second(kernels, x)))()

    plain = derivatives(lambda kernels, x: jnp.einsum("nocg,nhwcg->nhwog", kernels[action], x, precision="highest"))
    ours = derivatives(lambda kernels, x: applied(kernels, action, x))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()), ours, plain)
    for of_kernels, _ in ours:
        assert np.all(of_kernels[3] == 0)
