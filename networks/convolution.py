"""The one place that decides how a convolution is computed on which platform.

Everywhere a stride becomes 1, by moving blocks of pixels into the channels: many channels and few taps are what fast
convolutions are written for, on GPUs too, and frames have few channels. The bytes of frames are moved as words, and on a CPU so
are pairs of bfloat16.

With a stride of 1 `lax.conv` is the right choice on a GPU or TPU, forward and for gradients. On a CPU, XLA computes the
*gradient* of a convolution inside `lax.scan` tens of times slower than outside, because the loop loses the fast convolution for
any but the plain forward layout. So there the gradient is written with what the loop keeps fast: a plain forward convolution
for the gradient of the input, and products of matrices for the gradient of the kernel; of small maps the other way round. In
bfloat16 the convolution and both gradients are products: some processors have units for these (AMX), which XLA's convolutions
leave idle.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num, UInt8

from networks.products import transposed

LAYOUT = ("NHWC", "HWIO", "NHWC")
SAMPLES = 16  # at a time, in the gradient of a kernel on a CPU
BORDER = 1.5  # times as many pixels before a convolution as after it make a map small, for its gradients on a CPU


def conv2d(
    x: Float[Array, "N H W C"], kernel: Float[Array, "kh kw C O"], stride: int = 1, padding: str = "VALID"
) -> Float[Array, "N h w O"]:
    """Two-dimensional convolution (cross-correlation, as in every deep-learning library), channels last.

    Args:
        x: input maps.
        kernel: the filters.
        stride: the same for both axes.
        padding: "VALID", or "SAME" (zeros, the surplus one on the bottom and right).

    Raises:
        ValueError: an unknown padding.
    """
    if padding == "SAME":
        pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    elif padding != "VALID":
        raise ValueError(f"padding must be VALID or SAME, not {padding!r}")
    return unit_stride_conv(*space_to_depth(x, kernel, stride))


def frames_conv2d(frames: Num[Array, "N C H W"], kernel: Float[Array, "kh kw C O"], stride: int) -> Float[Array, "N h w O"]:
    """VALID convolution of frames as emulators return them, channels first, each pixel divided by 255.

    Args:
        frames: in bytes, or in any other type (which is slower).
        kernel: the filters, in the type that is to multiply.
        stride: the same for both axes.
    """
    if frames.dtype == jnp.uint8 and stride == 4 and kernel.shape[0] % 4 == kernel.shape[1] % 4 == 0:
        return unit_stride_conv(*bytes_to_depth(frames, kernel))
    return conv2d((frames.astype(jnp.float32) / 255.0).transpose(0, 2, 3, 1).astype(kernel.dtype), kernel, stride)


def grid_layer(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "kh kw C O"],
    bias: Float[Array, " O"],
    activation: Callable[[Array], Array],
) -> Float[Array, "N h w O"]:
    """activation(convolution + bias), VALID and of stride 1, for maps of few pixels and channels.

    One product of kernel and patches for the whole batch, samples in the last axis: on a CPU twice as fast as `conv2d`, whose
    loops over channels are too short there; and of many networks at once (`vmap` over their parameters) a batched product.
    """
    kh, kw, c, o = kernel.shape
    n, rows, cols = x.shape[0], x.shape[1] - kh + 1, x.shape[2] - kw + 1
    x = x.transpose(3, 1, 2, 0)
    patches = jnp.concatenate([x[:, i : i + rows, j : j + cols] for i in range(kh) for j in range(kw)])
    patches = lax.optimization_barrier(patches.reshape(kh * kw * c, -1))
    y = (kernel.reshape(-1, o).T @ patches).reshape(o, rows, cols, n).transpose(1, 2, 0, 3)
    # the barrier keeps that layout: a dense layer that follows reads it as it is
    y = lax.optimization_barrier(activation(y + bias[:, None]))
    return y.reshape(-1, n).T.reshape(n, rows, cols, o)


def unit_stride_conv(x: Float[Array, "N H W C"], kernel: Float[Array, "kh kw C O"]) -> Float[Array, "N h w O"]:
    """The VALID convolution of the platform."""
    return lax.platform_dependent(x, kernel, cpu=cpu_conv, default=valid_conv)


def valid_conv(x: Array, kernel: Array) -> Array:
    """`lax.conv` in the one layout used here."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)


def space_to_depth(
    x: Float[Array, "N H W C"], kernel: Float[Array, "kh kw C O"], stride: int
) -> tuple[Float[Array, "N h w D"], Float[Array, "_ _ D O"]]:
    """Map and kernel whose convolution with a stride of 1 is that of these with a stride s: each s x s block of pixels, and of
    taps, is moved into the channels."""
    if stride == 1:
        return x, kernel
    kh, kw, c, o = kernel.shape
    rows, cols = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], (kh, kw), strict=True))
    taps_h, taps_w = -(-kh // stride), -(-kw // stride)
    kernel = jnp.pad(kernel, ((0, taps_h * stride - kh), (0, taps_w * stride - kw), (0, 0), (0, 0)))
    kernel = kernel.reshape(taps_h, stride, taps_w, stride, c, o).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(taps_h, taps_w, stride * stride * c, o)

    blocks_h, blocks_w = rows + taps_h - 1, cols + taps_w - 1
    x = x[:, : blocks_h * stride, : blocks_w * stride]
    x = jnp.pad(x, ((0, 0), (0, blocks_h * stride - x.shape[1]), (0, blocks_w * stride - x.shape[2]), (0, 0)))
    if x.dtype == jnp.bfloat16 and c % 2 == 0:
        x = lax.platform_dependent(x, cpu=partial(_blocks_of_words, side=stride), default=partial(_blocks, side=stride))
    else:
        x = _blocks(x, stride)
    return lax.optimization_barrier(x), kernel  # or XLA would rearrange x once more for the gradient


def _blocks(x: Num[Array, "N H W C"], side: int) -> Num[Array, "N h w D"]:
    """Each block of side x side pixels in the channels."""
    n, height, width, c = x.shape
    x = x.reshape(n, height // side, side, width // side, side, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // side, width // side, side * side * c)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _blocks_of_words(x: Float[Array, "N H W C"], side: int) -> Float[Array, "N h w D"]:
    """`_blocks` of bfloat16 with an even number of channels, for a CPU: two that move as one word take half the time."""
    n, height, width, c = x.shape
    pairs = lax.optimization_barrier(x).reshape(n, height, width, c // 2, 2)  # or XLA would also compute x two by two, slowly
    blocks = _blocks(lax.bitcast_convert_type(pairs, jnp.uint32), side)
    return lax.bitcast_convert_type(blocks, x.dtype).reshape(*blocks.shape[:3], side * side * c)


# JAX takes what was a word to be constant, and its gradient to be 0
_blocks_of_words.defjvp(lambda side, x, dx: (_blocks_of_words(*x, side), _blocks(*dx, side)))


def bytes_to_depth(
    frames: UInt8[Array, "N C H W"], kernel: Float[Array, "kh kw C O"]
) -> tuple[Float[Array, "N h w D"], Float[Array, "_ _ D O"]]:
    """`space_to_depth` of frames / 255 and a stride of 4, for kernels whose sides are multiples of 4.

    Four neighbours in a row make one word, and moving blocks of pixels into the channels moves words, before any are floats.
    On a CPU, XLA also turns bytes that were words into floats several times as fast as those that were not.
    """
    kh, kw, c, o = kernel.shape
    n, _, height, width = frames.shape
    blocks_h, blocks_w = height // 4, width // 4
    words = frames[:, :, : blocks_h * 4, : blocks_w * 4].reshape(n, c, blocks_h, 4, blocks_w, 4)
    words = lax.bitcast_convert_type(words, jnp.uint32).transpose(0, 2, 4, 1, 3)
    x = lax.bitcast_convert_type(words, jnp.uint8).reshape(n, blocks_h, blocks_w, c * 16)
    kernel = kernel.reshape(kh // 4, 4, kw // 4, 4, c, o).transpose(0, 2, 4, 1, 3, 5).reshape(kh // 4, kw // 4, c * 16, o)
    return lax.optimization_barrier((x.astype(jnp.float32) / 255.0).astype(kernel.dtype)), kernel


@jax.custom_vjp
def cpu_conv(x: Array, kernel: Array) -> Array:
    """`valid_conv` as it is fast on a CPU inside `lax.scan`, and its gradient too."""
    return _conv_by_products(x, kernel) if x.dtype == jnp.bfloat16 else valid_conv(x, kernel)


def _forward(x, kernel):
    # not `valid_conv`: the gradient of a gradient differentiates this, too
    return cpu_conv(x, kernel), (x, kernel)


def _backward(residuals, g):
    x, kernel = residuals
    in_bfloat16 = x.dtype == jnp.bfloat16
    # a full convolution, and shifts along whole rows, also multiply the zeros around g: of small maps too many
    small = not in_bfloat16 and x.shape[1] * x.shape[2] > BORDER * g.shape[1] * g.shape[2]
    # XLA drops what is for the gradient of x where nobody asks for it, as for the pixels
    if in_bfloat16 or small:
        x_gradient = _input_gradient_by_products(g, kernel)
    else:
        x_gradient = _full_conv(g, kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    return x_gradient, _kernel_gradient_by_conv(x, g) if small else _kernel_gradient(x, g, kernel.shape)


def _conv_by_products(x: Float[Array, "N H W C"], kernel: Float[Array, "kh kw C O"]) -> Float[Array, "N h w O"]:
    """`valid_conv`: one product of all pixels with all taps; what comes of each tap is shifted to where it belongs, and summed
    up in float32. (The product is rounded to `x`'s type: twice the bytes would take longer.)"""
    kh, kw, c, o = kernel.shape
    n, height, width, _ = x.shape
    rows, cols = height - kh + 1, width - kw + 1
    taps = (x.reshape(-1, c) @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)).reshape(n, height, width, kh, kw, o)
    shifts = [taps[:, i : i + rows, j : j + cols, i, j].astype(jnp.float32) for i in range(kh) for j in range(kw)]
    return lax.optimization_barrier(sum(shifts).astype(x.dtype))  # or XLA would fuse it with what follows, slowly


def _input_gradient_by_products(g: Float[Array, "N h w O"], kernel: Float[Array, "kh kw C O"]) -> Float[Array, "N H W C"]:
    """Likewise one product with all taps, or in float32 one with each row of them; what comes of a tap is shifted to the pixels
    that it saw."""
    kh, kw, c, o = kernel.shape
    if kh > 1 and g.dtype == jnp.float32:
        rows = [lax.optimization_barrier(_input_gradient_by_products(g, row[None])) for row in kernel]
        return sum(jnp.pad(row, ((0, 0), (i, kh - 1 - i), (0, 0), (0, 0))) for i, row in enumerate(rows))
    taps = (g.reshape(-1, o) @ transposed(kernel.reshape(-1, o))).reshape(*g.shape[:3], kh, kw, c).astype(jnp.float32)
    shifts = [(i, j, ((0, 0), (i, kh - 1 - i), (j, kw - 1 - j), (0, 0))) for i in range(kh) for j in range(kw)]
    return sum(jnp.pad(taps[:, :, :, i, j], pads) for i, j, pads in shifts).astype(g.dtype)


def _kernel_gradient_by_conv(x: Float[Array, "N H W C"], g: Float[Array, "N h w O"]) -> Float[Array, "kh kw C O"]:
    """The convolution of x with g, in which samples are channels and channels are samples."""
    x, g = lax.optimization_barrier((x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)))  # as the loop keeps it fast
    return cpu_conv(x, g).transpose(1, 2, 0, 3)


def _kernel_gradient(
    x: Float[Array, "N H W C"], g: Float[Array, "N h w O"], shape: tuple[int, int, int, int]
) -> Float[Array, "kh kw C O"]:
    """Products of what each tap saw with the gradient g of what came of it: for each row of taps one with the rows that it saw,
    whole, for which g is shifted along the columns.

    XLA's product is fastest where both matrices lie in memory row by row, and its sums are not long. So `g` is laid out channel
    by channel, and there is a product for each few samples, of as many as divide the batch.
    """
    kh, kw, c, o = shape
    n, rows, cols, _ = g.shape
    piece = max(size for size in range(1, SAMPLES + 1) if n % size == 0)
    if piece < 4 and n > SAMPLES:  # of single samples products are slow: leave some over
        even = n - n % SAMPLES
        return _kernel_gradient(x[:even], g[:even], shape) + _kernel_gradient(x[even:], g[even:], shape)
    g = g.reshape(-1, piece, rows, cols, o).transpose(0, 4, 1, 2, 3)
    g = lax.optimization_barrier(jnp.pad(g, (*[(0, 0)] * 4, (kw - 1, kw - 1))))  # or XLA would lay it out for each shift anew
    shifted = jnp.stack([g[..., j : j + x.shape[2]] for j in reversed(range(kw))], axis=1)
    shifted = lax.optimization_barrier(shifted.reshape(len(g), kw * o, -1))
    products = [jnp.sum(shifted @ x[:, i : i + rows].reshape(len(g), -1, c), axis=0) for i in range(kh)]
    return jnp.stack(products).reshape(kh, kw, o, c).swapaxes(2, 3)


cpu_conv.defvjp(_forward, _backward)


@jax.custom_vjp
def _full_conv(x, kernel):
    pads = [(k - 1, k - 1) for k in kernel.shape[:2]]
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=LAYOUT)


def _full_backward(residuals, g):  # of second order: what a penalty on gradients needs
    kh, kw = residuals[1].shape[:2]
    pads = ((0, 0), (kh - 1, kh - 1), (kw - 1, kw - 1), (0, 0))
    return jax.vjp(lambda x, kernel: cpu_conv(jnp.pad(x, pads), kernel), *residuals)[1](g)


_full_conv.defvjp(lambda x, kernel: (_full_conv(x, kernel), (x, kernel)), _full_backward)
