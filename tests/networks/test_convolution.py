"""The convolutions, and the one written for the CPU, equal `lax.conv`, forward and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

from networks.convolution import (
    LAYOUT,
    bytes_to_depth,
    conv2d,
    cpu_conv,
    frames_conv2d,
    grid_layer,
    space_to_depth,
    valid_conv,
)


def lax_conv(x, kernel, stride):
    return lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=LAYOUT)


@partial(jax.jit, static_argnums=0)  # one program compiles sooner than its operations one by one
def with_gradients(conv, x, kernel, g):
    y, vjp = jax.vjp(conv, x, kernel)
    return y, *vjp(g)


def assert_same(x_shape, kernel_shape, stride):
    def plain(x, kernel):
        return lax_conv(x, kernel, stride)

    shapes = x_shape, kernel_shape, jax.eval_shape(plain, jnp.zeros(x_shape), jnp.zeros(kernel_shape)).shape
    keys = jax.random.split(jax.random.key(0), 3)
    args = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    y, *gradients = with_gradients(plain, *args)
    for conv in (cpu_conv, valid_conv):  # of all platforms
        actual, *actual_gradients = with_gradients(lambda *args, conv=conv: conv(*space_to_depth(*args, stride)), *args)
        assert_allclose(actual, y, atol=1e-5 * args[1].size ** 0.5)
        for a, e in zip(actual_gradients, gradients, strict=True):
            assert_allclose(a, e, atol=1e-5 * float(jnp.abs(e).max()) + 1e-6)

    args = [jax.random.randint(key, shape, -1, 2).astype(jnp.float32) for key, shape in zip(keys, shapes, strict=True)]
    expected = with_gradients(plain, *args)
    assert max(float(jnp.abs(e).max()) for e in expected) < 256  # whole numbers as small as that are exact in bfloat16
    rounded = with_gradients(lambda *args: cpu_conv(*space_to_depth(*args, stride)), *(a.astype(jnp.bfloat16) for a in args))
    for a, e in zip(rounded, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert_array_equal(a.astype(jnp.float32), e)


@pytest.mark.parametrize(
    "x_shape, kernel_shape, stride",
    [
        ((3, 84, 84, 4), (8, 8, 4, 32), 4),
        ((3, 20, 20, 32), (4, 4, 32, 64), 2),
        ((3, 9, 9, 64), (3, 3, 64, 64), 1),
        ((3, 8, 8, 64), (2, 2, 64, 128), 1),
    ],
)
def test_equals_lax_conv_on_the_shapes_in_use(x_shape, kernel_shape, stride):
    assert_same(x_shape, kernel_shape, stride)


@settings(max_examples=4, deadline=None)
@given(
    n=st.integers(1, 40),
    size=st.integers(5, 12),
    k=st.integers(1, 5),
    kw=st.integers(1, 5),
    stride=st.integers(1, 4),
    c=st.integers(1, 4),
    o=st.integers(1, 4),
)
@example(n=17, size=5, k=2, kw=1, stride=1, c=4, o=2)  # of which there are no equal pieces
@example(n=38, size=7, k=2, kw=3, stride=2, c=2, o=4)  # nor blocks without more pixels
@example(n=5, size=6, k=3, kw=2, stride=1, c=3, o=2)  # of which few pixels are left
def test_equals_lax_conv_on_any_shape(n, size, k, kw, stride, c, o):
    assert_same((n, size, size + 1, c), (k, kw, c, o), stride)


@settings(max_examples=4, deadline=None)
@given(height=st.integers(8, 25), width=st.integers(8, 25), c=st.integers(1, 4), k=st.sampled_from([(8, 8), (4, 8), (12, 4)]))
@example(height=13, width=18, c=2, k=(12, 4))
def test_frames_in_bytes_are_convolved_as_floats(height, width, c, k):
    frames = jax.random.randint(jax.random.key(0), (2, c, max(height, k[0]), width), 0, 256).astype(jnp.uint8)
    kernel = jax.random.normal(jax.random.key(1), (*k, c, 5)) / 8
    floats = frames.transpose(0, 2, 3, 1) / jnp.float32(255)
    expected, expected_vjp = jax.vjp(lambda kernel: lax_conv(floats, kernel, 4), kernel)
    g = jax.random.normal(jax.random.key(2), expected.shape)
    for conv in (cpu_conv, valid_conv):
        actual, actual_vjp = jax.vjp(lambda kernel, conv=conv: conv(*bytes_to_depth(frames, kernel)), kernel)
        assert_allclose(actual, expected, atol=1e-5)
        assert_allclose(actual_vjp(g)[0], expected_vjp(g)[0], atol=1e-4)


@pytest.mark.parametrize(
    "dtype, stride, k, words",
    [("uint8", 4, (8, 8), True), ("float32", 4, (8, 8), False), ("uint8", 3, (8, 8), False), ("uint8", 4, (8, 6), False)],
)
def test_frames_of_any_type_and_stride(dtype, stride, k, words):
    frames = jax.random.uniform(jax.random.key(0), (2, 3, 11, 13), maxval=255.0).astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), (*k, 3, 5)) / 8
    expected = lax_conv(frames.transpose(0, 2, 3, 1) / jnp.float32(255), kernel, stride)
    assert_allclose(frames_conv2d(frames, kernel, stride), expected, atol=1e-5)
    hlo = jax.jit(frames_conv2d, static_argnums=2).lower(frames, kernel, stride).as_text()
    assert ("ui32" in hlo) == words


@pytest.mark.parametrize(
    "k, stride, dtype, error",
    [(2, 1, "float32", 1e-4), (3, 1, "float32", 1e-4), (2, 2, "float32", 1e-4), (2, 2, "bfloat16", 0.05)],
)
def test_second_order_gradients_equal_those_of_lax_conv(k, stride, dtype, error):
    keys, shapes = jax.random.split(jax.random.key(1), 3), ((2, 7, 7, 6), (k, k, 6, 4), (2, 7, 7, 6))
    x, kernel, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))

    def slope(conv):
        """Of the squared gradient for the input: what a gradient penalty needs."""

        def penalty(x, kernel):
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(conv(x, kernel))))(x)
            return jnp.sum(v * gradient**2)

        return jax.grad(penalty, argnums=(0, 1))(x, kernel)

    ours = slope(lambda *args: cpu_conv(*space_to_depth(*(a.astype(dtype) for a in args), stride)).astype(jnp.float32))
    for actual, expected in zip(ours, slope(lambda x, kernel: lax_conv(x, kernel, stride)), strict=True):
        assert_allclose(actual, expected, atol=error * float(jnp.abs(expected).max()))


def test_same_padding_and_unknown_padding():
    x, kernel = jnp.ones((1, 3, 3, 1)), jnp.ones((2, 2, 1, 1))
    assert_allclose(conv2d(x, kernel, padding="SAME")[0, :, :, 0], [[4, 4, 2], [4, 4, 2], [2, 2, 1]])
    with pytest.raises(ValueError, match="VALID or SAME"):
        conv2d(x, kernel, padding="FULL")


@settings(max_examples=3, deadline=None)
@given(n=st.integers(1, 5), size=st.integers(3, 6), k=st.integers(1, 3), c=st.integers(1, 4), o=st.integers(1, 4))
def test_grid_layer_equals_lax_conv(n, size, k, c, o):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (n, size, size + 1, c), (k, k, c, o), (o,), (n, size - k + 1, size - k + 2, o)
    x, kernel, bias, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    expected, expected_vjp = jax.vjp(lambda *args: jnp.tanh(valid_conv(*args[:2]) + args[2]), x, kernel, bias)
    actual, actual_vjp = jax.vjp(lambda *args: grid_layer(*args, jnp.tanh), x, kernel, bias)
    assert_allclose(actual, expected, atol=1e-5)
    for a, e in zip(actual_vjp(g), expected_vjp(g), strict=True):
        assert_allclose(a, e, atol=1e-4)


def test_is_what_runs_here():
    """On a CPU the gradient is the one written with matrix products, of small maps with a plain convolution, in bfloat16 all is
    products, and only there."""
    kernel, cpu = jnp.ones((3, 3, 4, 4)), jax.default_backend() == "cpu"
    for size, small in ((15, False), (9, True)):
        x = jnp.ones((2, size, size, 4))
        hlo = jax.jit(jax.value_and_grad(lambda k, x=x: conv2d(x, k).sum())).lower(kernel).as_text()
        assert ("dot_general" in hlo) == (cpu and not small) and "convolution" in hlo
        assert ("[f, 0, 1, b]" in hlo) != cpu
        hlo = jax.jit(jax.grad(lambda x: conv2d(x, kernel).sum())).lower(x).as_text()
        assert ("dot_general" in hlo) == ("convolution" not in hlo) == (cpu and small)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    hlo = jax.jit(jax.grad(lambda k: conv2d(x, k, 2).astype(jnp.float32).sum())).lower(kernel).as_text()
    assert ("dot_general" in hlo) == ("ui32" in hlo) == ("convolution" not in hlo) == cpu


@pytest.mark.parametrize("size", [9, 15])
def test_second_order_gradients_keep_to_the_fast_layout(size):
    """In none of them may XLA's own gradient for the kernel come up, which is tens of times slower inside a scan."""
    x, kernel = jnp.ones((2, size, size, 4)), jnp.ones((3, 3, 4, 4))

    def text(conv):
        slope = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel))))
        return jax.jit(jax.grad(lambda kernel: jnp.sum(slope(x, kernel) ** 2))).lower(kernel).as_text()

    assert "[f, 0, 1, b]" in text(valid_conv)
    assert "[f, 0, 1, b]" not in text(cpu_conv)
