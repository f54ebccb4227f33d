"""The product written for the CPU equals the plain one, and its gradient."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from networks.products import cpu_product, product, transposed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@settings(max_examples=4, deadline=None)
@given(batch=st.sampled_from([(), (0,), (1,), (7,), (2, 3)]), d=st.integers(1, 9), k=st.integers(1, 9))
def test_equals_the_plain_product(dtype, batch, d, k):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (*batch, d), (d, k), (*batch, k)
    x, kernel, g = (jax.random.randint(key, shape, -4, 5) for key, shape in zip(keys, shapes, strict=True))
    rows, rows_g = x.reshape(-1, d), g.reshape(-1, k)
    expected = x @ kernel, g @ kernel.T, rows.T @ rows_g  # at most 16 * 9: exact in bfloat16
    for ours in (product, cpu_product):
        y, vjp = jax.vjp(ours, x.astype(dtype), kernel.astype(dtype))
        for a, e in zip((y, *vjp(g.astype(dtype))), expected, strict=True):
            assert a.dtype == dtype
            assert_array_equal(a.astype(jnp.int32), e)


@settings(max_examples=4, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9))
def test_transposed(m, n):
    a = jnp.arange(m * n, dtype=jnp.bfloat16).reshape(m, n)
    assert_array_equal(transposed(a), a.T)
