"""The convolutions, and the one written for the CPU, equal `lax.conv`, forward and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
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


@partial(jax.jit, static_argnums=(0, 1))  # one program compiles sooner than its operations one by one
def with_gradients(conv, stride, x, kernel, g):
    y, vjp = jax.vjp(lambda x, kernel: conv(x, kernel, stride), x, kernel)
    return y, *vjp(g)


def unit_stride(conv):
    return lambda x, kernel, stride: conv(*space_to_depth(x, kernel, stride))


OURS = [unit_stride(conv) for conv in (cpu_conv, valid_conv)]  # of all platforms


def normals(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def assert_same(x_shape, kernel_shape, stride):
    rows, cols = ((n - k) // stride + 1 for n, k in zip(x_shape[1:3], kernel_shape, strict=False))
    shapes = x_shape, kernel_shape, (x_shape[0], rows, cols, kernel_shape[3])
    args = normals(*shapes)
    y, *gradients = jax.device_get(with_gradients(lax_conv, stride, *args))
    for conv in OURS if stride > 1 else OURS[:1]:  # with stride 1, the other one is the expected convolution itself
        actual, *actual_gradients = with_gradients(conv, stride, *args)
        assert_allclose(actual, y, atol=1e-5 * args[1].size ** 0.5)
        for a, e in zip(actual_gradients, gradients, strict=True):
            assert_allclose(a, e, atol=1e-5 * np.abs(e).max() + 1e-6)

    rng = np.random.default_rng(1)
    args = [rng.integers(-1, 2, shape).astype(np.float32) for shape in shapes]
    expected = jax.device_get(with_gradients(lax_conv, stride, *args))
    assert max(np.abs(e).max() for e in expected) < 256  # whole numbers as small as that are exact in bfloat16
    rounded = with_gradients(OURS[0], stride, *(a.astype(jnp.bfloat16) for a in args))
    for a, e in zip(rounded, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert_array_equal(np.asarray(a).astype(np.float32), e)


@pytest.mark.parametrize(
    "x_shape, kernel_shape, stride",
    [
        ((3, 84, 84, 4), (8, 8, 4, 32), 4),
        ((3, 9, 9, 64), (3, 3, 64, 64), 1),
        # as the first one, large maps, with fewer strides
        pytest.param((3, 20, 20, 32), (4, 4, 32, 64), 2, marks=pytest.mark.slow),
        pytest.param((3, 8, 8, 64), (2, 2, 64, 128), 1, marks=pytest.mark.slow),
    ],
)
def test_equals_lax_conv_on_the_shapes_in_use(x_shape, kernel_shape, stride):
    assert_same(x_shape, kernel_shape, stride)


@settings(max_examples=2, deadline=None)
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


@settings(max_examples=2, deadline=None)
@given(height=st.integers(8, 25), width=st.integers(8, 25), c=st.integers(1, 4), k=st.sampled_from([(8, 8), (4, 8), (12, 4)]))
@example(height=13, width=18, c=2, k=(12, 4))
def test_frames_in_bytes_are_convolved_as_floats(height, width, c, k):
    height = max(height, k[0])
    frames = np.random.default_rng(0).integers(0, 256, (2, c, height, width), np.uint8)
    kernel, g = normals((*k, c, 5), (2, (height - k[0]) // 4 + 1, (width - k[1]) // 4 + 1, 5))

    @jax.jit
    def convolved(frames, kernel, g):
        floats = frames.transpose(0, 2, 3, 1) / jnp.float32(255)
        convs = [lambda kernel, conv=conv: conv(*bytes_to_depth(frames, kernel)) for conv in (cpu_conv, valid_conv)]
        found = [jax.vjp(conv, kernel) for conv in (lambda kernel: lax_conv(floats, kernel, 4), *convs)]
        return [(y, vjp(g)[0]) for y, vjp in found]

    (expected, expected_gradient), *ours = convolved(frames, kernel / 8, g)
    for actual, gradient in ours:
        assert_allclose(actual, expected, atol=1e-5)
        assert_allclose(gradient, expected_gradient, atol=1e-4)


@pytest.mark.parametrize(
    "dtype, stride, k, words",
    [("uint8", 4, (8, 8), True), ("float32", 4, (8, 8), False), ("uint8", 3, (8, 8), False), ("uint8", 4, (8, 6), False)],
)
def test_frames_of_any_type_and_stride(dtype, stride, k, words):
    frames = np.random.default_rng(0).uniform(high=255.0, size=(2, 3, 11, 13)).astype(dtype)
    (kernel,) = normals((*k, 3, 5))
    ours = jax.jit(frames_conv2d, static_argnums=2).lower(frames, kernel / 8, stride)
    expected = lax_conv(frames.transpose(0, 2, 3, 1) / np.float32(255), kernel / 8, stride)
    assert_allclose(ours.compile()(frames, kernel / 8), expected, atol=1e-5)
    assert ("ui32" in ours.as_text()) == words


@pytest.mark.parametrize(
    "k, stride, dtype, error",
    [(2, 1, "float32", 1e-4), (3, 1, "float32", 1e-4), (2, 2, "float32", 1e-4), (2, 2, "bfloat16", 0.05)],
)
def test_second_order_gradients_equal_those_of_lax_conv(k, stride, dtype, error):
    x, kernel, v = normals((2, 7, 7, 6), (k, k, 6, 4), (2, 7, 7, 6))

    def slope(conv):
        """Of the squared gradient for the input: what a gradient penalty needs."""

        def penalty(x, kernel):
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(conv(x, kernel))))(x)
            return jnp.sum(v * gradient**2)

        return jax.jit(jax.grad(penalty, argnums=(0, 1)))(x, kernel)

    ours = slope(lambda *args: cpu_conv(*space_to_depth(*(a.astype(dtype) for a in args), stride)).astype(jnp.float32))
    for actual, expected in zip(ours, slope(lambda x, kernel: lax_conv(x, kernel, stride)), strict=True):
        assert_allclose(actual, expected, atol=error * np.abs(expected).max())


def test_same_padding_and_unknown_padding():
    x, kernel = jnp.ones((1, 3, 3, 1)), jnp.ones((2, 2, 1, 1))
    assert_allclose(conv2d(x, kernel, padding="SAME")[0, :, :, 0], [[4, 4, 2], [4, 4, 2], [2, 2, 1]])
    with pytest.raises(ValueError, match="VALID or SAME"):
        conv2d(x, kernel, padding="FULL")


@settings(max_examples=2, deadline=None)
@given(n=st.integers(1, 5), size=st.integers(3, 6), k=st.integers(1, 3), c=st.integers(1, 4), o=st.integers(1, 4))
def test_grid_layer_equals_lax_conv(n, size, k, c, o):
    *args, g = normals((n, size, size + 1, c), (k, k, c, o), (o,), (n, size - k + 1, size - k + 2, o))

    @jax.jit
    def layers(args, g):
        plain = lambda x, kernel, bias: jnp.tanh(valid_conv(x, kernel) + bias)  # noqa: E731
        found = [jax.vjp(layer, *args) for layer in (plain, lambda *args: grid_layer(*args, jnp.tanh))]
        return [(y, vjp(g)) for y, vjp in found]

    (expected, expected_gradients), (actual, gradients) = layers(args, g)
    assert_allclose(actual, expected, atol=1e-5)
    for a, e in zip(gradients, expected_gradients, strict=True):
        assert_allclose(a, e, atol=1e-4)


def test_is_what_runs_here():
    """On a CPU the gradient is the one written with matrix products, of small maps or few channels a plain convolution, in
    bfloat16 all is products, and only there."""
    cpu = jax.default_backend() == "cpu"
    few = jax.jit(jax.grad(lambda k: conv2d(jnp.ones((2, 15, 15, 4)), k).sum())).lower(jnp.ones((3, 3, 4, 8))).as_text()
    assert "dot_general" not in few and ("[f, 0, 1, b]" in few) != cpu
    kernel = jnp.ones((3, 3, 8, 8))
    for size, small in ((15, False), (9, True)):
        x = jnp.ones((2, size, size, 8))
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
