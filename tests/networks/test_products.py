"""The product written for the CPU equals the plain one, and its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from networks.products import cpu_product, product, transposed


@partial(jax.jit, static_argnums=3)
def with_gradients(x, kernel, g, dtype):
    def of(ours):
        y, vjp = jax.vjp(ours, x.astype(dtype), kernel.astype(dtype))
        return y, *vjp(g.astype(dtype))

    return of(product), of(cpu_product)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@settings(max_examples=4, deadline=None)
@given(batch=st.sampled_from([(), (0,), (1,), (7,), (2, 3)]), d=st.integers(1, 9), k=st.integers(1, 9))
def test_equals_the_plain_product(dtype, batch, d, k):
    rng = np.random.default_rng(0)
    x, kernel, g = (rng.integers(-4, 5, shape, np.int32) for shape in ((*batch, d), (d, k), (*batch, k)))
    rows, rows_g = x.reshape(-1, d), g.reshape(-1, k)
    expected = x @ kernel, g @ kernel.T, rows.T @ rows_g  # at most 16 * 9: exact in bfloat16
    for found in with_gradients(x, kernel, g, dtype):
        for a, e in zip(found, expected, strict=True):
            assert a.dtype == dtype
            assert_array_equal(np.asarray(a).astype(np.int32), e)


@settings(max_examples=4, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9))
def test_transposed(m, n):
    a = jnp.arange(m * n, dtype=jnp.bfloat16).reshape(m, n)
    assert_array_equal(transposed(a), a.T)
