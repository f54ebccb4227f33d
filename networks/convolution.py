"""Convolutions, and how each platform computes them.

A convolution of stride s is computed with stride 1: each block of s x s pixels becomes one pixel with more channels. It is then
faster, on GPUs too, because frames have few channels. Bytes move four at a time, and on a CPU, bfloat16 values two at a time.

On a GPU or TPU, `lax.conv` with stride 1 is the best choice, forward and for gradients. On a CPU, XLA computes the gradient of
a convolution inside `lax.scan` tens of times slower than outside: in a loop, only the plain forward layout is fast. The CPU
gradients therefore use operations that stay fast in the loop. The input gradient is a plain forward convolution, and the kernel
gradient is a sum of matrix products; for small maps, it is the other way round. In bfloat16, the convolution and both gradients
are matrix products, because some CPUs have units for them (AMX) that XLA's convolutions do not use.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num, UInt8

from networks.products import transposed

LAYOUT = ("NHWC", "HWIO", "NHWC")
SAMPLES = 16  # samples per matrix product at most, in the kernel gradient on a CPU
FEW = 4  # input channels, as of color images, for which products of the kernel gradient are too narrow on a CPU
BORDER = 1.5  # small map: pixels > BORDER x output pixels; selects the gradient used on a CPU


def conv2d(
    x: Float[Array, "N H W C"], kernel: Float[Array, "kh kw C O"], stride: int = 1, padding: str = "VALID"
) -> Float[Array, "N h w O"]:
    """Compute a two-dimensional convolution (cross-correlation, as usual in deep learning), channels last.

    Args:
        x: input maps.
        kernel: the filters.
        stride: the same for both axes.
        padding: "VALID", or "SAME" (zeros; an odd one goes to the bottom and right).

    Raises:
        ValueError: the padding is unknown.
    """
    if padding == "SAME":
        pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    elif padding != "VALID":
        raise ValueError(f"padding {padding!r}: must be VALID or SAME")
    return unit_stride_conv(*space_to_depth(x, kernel, stride))


def frames_conv2d(
    frames: Num[Array, "N C H W"], kernel: Float[Array, "kh kw C O"], stride: int, padding: str = "VALID"
) -> Float[Array, "N h w O"]:
    """Compute the convolution of frames as emulators return them: channels first, each pixel divided by 255.

    Args:
        frames: bytes, or any other type (which is slower).
        kernel: the filters; their type is used for multiplications.
        stride: the same for both axes.
        padding: see `conv2d`.
    """
    if padding == "VALID" and frames.dtype == jnp.uint8 and stride == 4 and kernel.shape[0] % 4 == kernel.shape[1] % 4 == 0:
        return unit_stride_conv(*bytes_to_depth(frames, kernel))
    return conv2d((frames.astype(jnp.float32) / 255.0).transpose(0, 2, 3, 1).astype(kernel.dtype), kernel, stride, padding)


def halve(x: Float[Array, "N H W C"]) -> Float[Array, "N h w C"]:
    """Return the maxima over windows of 3 x 3 pixels with a stride of 2 (SAME padding): half the pixels along each axis.

    Each axis in turn, and by slices: the gradient of a pooling operation is tens of times slower on a CPU. Where values are
    equal, the gradient is divided among them.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        low, high = lax.padtype_to_pads((size,), (3,), (2,), "SAME")[0]
        pads = [(0, 0)] * 4
        pads[axis] = low, high
        padded = jnp.pad(x, pads, constant_values=-jnp.inf)
        count = -(-size // 2)
        windows = [lax.slice_in_dim(padded, i, i + 2 * count - 1, stride=2, axis=axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(windows[0], windows[1]), windows[2])
    return x


def grid_layer(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "kh kw C O"],
    bias: Float[Array, " O"],
    activation: Callable[[Array], Array],
) -> Float[Array, "N h w O"]:
    """Compute activation(convolution + bias), VALID with stride 1, for maps with few pixels and channels.

    The whole batch is one product of kernel and patches, with samples on the last axis. On a CPU this is twice as fast as
    `conv2d`, whose loops over channels are too short here. Under `vmap` over parameters it becomes a batched product.
    """
    kh, kw, c, o = kernel.shape
    n, rows, cols = x.shape[0], x.shape[1] - kh + 1, x.shape[2] - kw + 1
    x = x.transpose(3, 1, 2, 0)
    patches = jnp.concatenate([x[:, i : i + rows, j : j + cols] for i in range(kh) for j in range(kw)])
    patches = lax.optimization_barrier(patches.reshape(kh * kw * c, -1))
    y = (kernel.reshape(-1, o).T @ patches).reshape(o, rows, cols, n).transpose(1, 2, 0, 3)
    # the barrier keeps this layout, which a following dense layer reads without a copy
    y = lax.optimization_barrier(activation(y + bias[:, None]))
    return y.reshape(-1, n).T.reshape(n, rows, cols, o)


def unit_stride_conv(x: Float[Array, "N H W C"], kernel: Float[Array, "kh kw C O"]) -> Float[Array, "N h w O"]:
    """Compute the VALID convolution with the platform's implementation."""
    return lax.platform_dependent(x, kernel, cpu=cpu_conv, default=valid_conv)


def valid_conv(x: Array, kernel: Array) -> Array:
    """Compute the VALID convolution with `lax.conv`, in the one layout used here."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)


def space_to_depth(
    x: Float[Array, "N H W C"], kernel: Float[Array, "kh kw C O"], stride: int
) -> tuple[Float[Array, "N h w D"], Float[Array, "_ _ D O"]]:
    """Move each stride x stride block of pixels, and of taps, into the channels. The convolution of the returned map and kernel
    with stride 1 equals the convolution of `x` and `kernel` with the given stride."""
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
    return lax.optimization_barrier(x), kernel  # or XLA would rearrange x again for the gradient


def _blocks(x: Num[Array, "N H W C"], side: int) -> Num[Array, "N h w D"]:
    """Move each block of side x side pixels into the channels."""
    n, height, width, c = x.shape
    x = x.reshape(n, height // side, side, width // side, side, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // side, width // side, side * side * c)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _blocks_of_words(x: Float[Array, "N H W C"], side: int) -> Float[Array, "N h w D"]:
    """`_blocks` for bfloat16 and an even number of channels, on a CPU. Moving two values as one word halves the time."""
    n, height, width, c = x.shape
    pairs = lax.optimization_barrier(x).reshape(n, height, width, c // 2, 2)  # or XLA would also compute x in pairs, slowly
    blocks = _blocks(lax.bitcast_convert_type(pairs, jnp.uint32), side)
    return lax.bitcast_convert_type(blocks, x.dtype).reshape(*blocks.shape[:3], side * side * c)


# JAX treats a bitcast from integers as constant, with a gradient of 0
_blocks_of_words.defjvp(lambda side, x, dx: (_blocks_of_words(*x, side), _blocks(*dx, side)))


def bytes_to_depth(
    frames: UInt8[Array, "N C H W"], kernel: Float[Array, "kh kw C O"]
) -> tuple[Float[Array, "N h w D"], Float[Array, "_ _ D O"]]:
    """Compute `space_to_depth` of frames / 255 with a stride of 4, for kernels whose sides are multiples of 4.

    Four neighbors in a row form one word. Words are moved into the channels before they become floats. On a CPU, XLA also
    converts bytes to floats several times faster if they come from words.
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
    """Compute `valid_conv`, with a forward pass and a gradient that are fast on a CPU inside `lax.scan`."""
    return _conv_by_products(x, kernel) if x.dtype == jnp.bfloat16 else valid_conv(x, kernel)


def _forward(x, kernel):
    # not `valid_conv`: second-order gradients differentiate this too
    return cpu_conv(x, kernel), (x, kernel)


def _backward(residuals, g):
    x, kernel = residuals
    in_bfloat16 = x.dtype == jnp.bfloat16
    # the gradients for large maps also multiply zeros around g, which costs too much on small maps
    small = not in_bfloat16 and x.shape[1] * x.shape[2] > BORDER * g.shape[1] * g.shape[2]
    # XLA drops the gradient of x if it is unused, as for pixels
    if in_bfloat16 or small:
        x_gradient = _input_gradient_by_products(g, kernel)
    else:
        x_gradient = _full_conv(g, kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    by_conv = small or (not in_bfloat16 and kernel.shape[2] <= FEW)
    return x_gradient, _kernel_gradient_by_conv(x, g) if by_conv else _kernel_gradient(x, g, kernel.shape)


def _conv_by_products(x: Float[Array, "N H W C"], kernel: Float[Array, "kh kw C O"]) -> Float[Array, "N h w O"]:
    """Compute `valid_conv` as one product of all pixels with all taps. Each tap's results are shifted into place and summed in
    float32. (The product itself is rounded to `x`'s type, because writing twice the bytes would take longer.)"""
    kh, kw, c, o = kernel.shape
    n, height, width, _ = x.shape
    rows, cols = height - kh + 1, width - kw + 1
    taps = (x.reshape(-1, c) @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)).reshape(n, height, width, kh, kw, o)
    shifts = [taps[:, i : i + rows, j : j + cols, i, j].astype(jnp.float32) for i in range(kh) for j in range(kw)]
    return lax.optimization_barrier(sum(shifts).astype(x.dtype))  # or XLA would fuse it with the next operation, slowly


def _input_gradient_by_products(g: Float[Array, "N h w O"], kernel: Float[Array, "kh kw C O"]) -> Float[Array, "N H W C"]:
    """Compute the input gradient as one product with all taps, or in float32 one product per row of taps. Each tap's
    results are shifted to the pixels that it read."""
    kh, kw, c, o = kernel.shape
    if kh > 1 and g.dtype == jnp.float32:
        rows = [lax.optimization_barrier(_input_gradient_by_products(g, row[None])) for row in kernel]
        return sum(jnp.pad(row, ((0, 0), (i, kh - 1 - i), (0, 0), (0, 0))) for i, row in enumerate(rows))
    taps = (g.reshape(-1, o) @ transposed(kernel.reshape(-1, o))).reshape(*g.shape[:3], kh, kw, c).astype(jnp.float32)
    shifts = [(i, j, ((0, 0), (i, kh - 1 - i), (j, kw - 1 - j), (0, 0))) for i in range(kh) for j in range(kw)]
    return sum(jnp.pad(taps[:, :, :, i, j], pads) for i, j, pads in shifts).astype(g.dtype)


def _kernel_gradient_by_conv(x: Float[Array, "N H W C"], g: Float[Array, "N h w O"]) -> Float[Array, "kh kw C O"]:
    """Compute the kernel gradient as the convolution of x with g, with samples as channels and channels as samples."""
    x, g = lax.optimization_barrier((x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)))  # this layout is fast inside `lax.scan`
    return cpu_conv(x, g).transpose(1, 2, 0, 3)


def _kernel_gradient(
    x: Float[Array, "N H W C"], g: Float[Array, "N h w O"], shape: tuple[int, int, int, int]
) -> Float[Array, "kh kw C O"]:
    """Compute the kernel gradient: the pixels that each tap read, times the output gradient g. Each row of taps is one matrix
    product: the full rows of x that it read, times g shifted along the columns.

    XLA's product is fastest if both matrices are row-major in memory and its sums are short. So `g` is laid out channel by
    channel, and each product covers only a few samples, a divisor of the batch size.
    """
    kh, kw, c, o = shape
    n, rows, cols, _ = g.shape
    piece = max(size for size in range(1, SAMPLES + 1) if n % size == 0)
    if piece < 4 and n > SAMPLES:  # products of so few samples are slow: split off a remainder
        even = n - n % SAMPLES
        return _kernel_gradient(x[:even], g[:even], shape) + _kernel_gradient(x[even:], g[even:], shape)
    g = g.reshape(-1, piece, rows, cols, o).transpose(0, 4, 1, 2, 3)
    g = lax.optimization_barrier(jnp.pad(g, (*[(0, 0)] * 4, (kw - 1, kw - 1))))  # or XLA would lay it out again for each shift
    shifted = jnp.stack([g[..., j : j + x.shape[2]] for j in reversed(range(kw))], axis=1)
    shifted = lax.optimization_barrier(shifted.reshape(len(g), kw * o, -1))
    products = [jnp.sum(shifted @ x[:, i : i + rows].reshape(len(g), -1, c), axis=0) for i in range(kh)]
    return jnp.stack(products).reshape(kh, kw, o, c).swapaxes(2, 3)


cpu_conv.defvjp(_forward, _backward)


@jax.custom_vjp
def _full_conv(x, kernel):
    pads = [(k - 1, k - 1) for k in kernel.shape[:2]]
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=LAYOUT)


def _full_backward(residuals, g):  # second order, for gradient penalties
    kh, kw = residuals[1].shape[:2]
    pads = ((0, 0), (kh - 1, kh - 1), (kw - 1, kw - 1), (0, 0))
    return jax.vjp(lambda x, kernel: cpu_conv(jnp.pad(x, pads), kernel), *residuals)[1](g)


_full_conv.defvjp(lambda x, kernel: (_full_conv(x, kernel), (x, kernel)), _full_backward)
