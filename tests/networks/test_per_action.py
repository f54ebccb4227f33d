"""The products of maps and the kernels of actions, as each platform computes them."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from networks.per_action import cpu_product, outer_product, summed_product

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
