"""Layers with a Lipschitz constant of at most 1 for every value of their parameters, and close to an isometry.

Matrices. W is first rescaled to W D^{-1/2}, with D = diag(row sums of |W^T W|) (almost-orthogonal layers, Prach & Lampert,
2022, theorem 1). Its norm is at most 1, because D - W^T W is diagonally dominant and therefore positive semi-definite. This is
already a certificate, but training may leave all singular values far below 1. So the rescaled W is multiplied by p(W^T W). Here
p is the polynomial of degree 4 for which s p(s^2) is closest to 1 on [0.3, 1], divided by the largest value of s p(s^2) there.
Each singular value s becomes s p(s^2). This maps [0, 1] into itself, which keeps the certificate, and [0.3, 1] into [0.95, 1].
(One step with the best coefficients does as much as several steps of Bjorck & Bowie, 1971, or Newton-Schulz, with a third of
the products.) Nothing here is iterated or relies on convergence.

Convolutions. A 2 x 2 kernel is a product of three factors, each of norm at most 1 (block convolutions, Li et al., 2019). One is
a matrix H as above. The others, one per axis, are (I - P) + P * (shift by one pixel) with P = R R^T and R as above. P is
symmetric with eigenvalues p in [0, 1]. In its eigenbasis, at frequency w, the factor is (1 - p) + p e^{iw}, of modulus at most
1. This bounds the convolution on the infinite grid. Zero padding followed by reading a window multiplies that convolution by
projections, so the bound also holds for the padded map.

The certificates hold for the exact map. The orthogonalization is computed in full float32 everywhere. The layers' own products
and convolutions use the platform's default precision, which on recent GPUs rounds each product to about 1e-3.

Layout. Matrix axes come first and batch axes last, `[m, n, *batch]`. Rows are inputs and columns are outputs, as in
`[N, m] @ [m, n]`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from networks.convolution import conv2d

# of p, lowest degree first; before scaling, they minimize max |1 - s p(s^2)| on [0.3, 1] (a linear program)
COEFFICIENTS = (4.45026, -17.37977, 38.29629, -38.94814, 14.58135)


def matmul(a: Float[Array, "m k *batch"], b: Float[Array, "k n *batch"]) -> Float[Array, "m n *batch"]:
    """Multiply two matrices, or each pair in two batches, in full float32 on every platform."""
    if a.ndim == 2:
        # by default, a GPU rounds float32 products to 10 bits of mantissa, beyond the certificate's tolerance
        return jnp.matmul(a, b, precision="highest")
    return _batched_matmul(a, b)


@jax.custom_vjp
def _batched_matmul(a, b):
    # for many small matrices, a sum over k vectorizes over the batch and is several times faster than a batched product;
    # the barrier, and a gradient of two such products, keep XLA from fusing chains of them into one slow loop
    return jax.lax.optimization_barrier(sum(a[:, k, None] * b[k][None] for k in range(a.shape[1])))


def _batched_matmul_backward(residuals, g):
    a, b = residuals
    return _batched_matmul(g, transpose(b)), _batched_matmul(transpose(a), g)


_batched_matmul.defvjp(lambda a, b: (_batched_matmul(a, b), (a, b)), _batched_matmul_backward)


@jax.custom_vjp
def gram(kernel: Float[Array, "m n *batch"]) -> Float[Array, "n n *batch"]:
    """Compute W^T W. Its gradient W (G + G^T) takes one product, where automatic differentiation takes two."""
    return matmul(transpose(kernel), kernel)


gram.defvjp(lambda kernel: (gram(kernel), kernel), lambda kernel, g: (matmul(kernel, g + transpose(g)),))


def transpose(a: Float[Array, "m n *batch"]) -> Float[Array, "n m *batch"]:
    """Transpose each matrix of the batch."""
    return jnp.swapaxes(a, 0, 1)


def orthogonalizer(gram_matrix: Float[Array, "n n *batch"]) -> Float[Array, "n n *batch"]:
    """Return a matrix M for which W M has norm at most 1 and singular values near 1, given the Gram matrix W^T W.

    The Gram matrix keeps the work on the smaller side of W. A layer can apply W and M in turn instead of forming W M. A zero
    column of W stays zero.
    """
    row_sums = jnp.sum(jnp.abs(gram_matrix), axis=1)
    # the gradient of rsqrt at 0 is infinite, so the argument must be replaced, not only the result
    scale = jnp.where(row_sums > 0, jax.lax.rsqrt(jnp.where(row_sums > 0, row_sums, 1.0)), 0.0)
    gram_matrix = scale[:, None] * gram_matrix * scale[None]
    eye = jnp.eye(gram_matrix.shape[0], dtype=gram_matrix.dtype).reshape(*gram_matrix.shape[:2], *(1,) * (gram_matrix.ndim - 2))
    c0, c1, c2, c3, c4 = COEFFICIENTS
    square = matmul(gram_matrix, gram_matrix)
    polynomial = c0 * eye + c1 * gram_matrix + c2 * square + matmul(square, c3 * gram_matrix + c4 * square)
    return scale[:, None] * polynomial


def orthogonal(kernel: Float[Array, "m n *batch"]) -> Float[Array, "m n *batch"]:
    """Make `kernel` (semi-)orthogonal: operator norm at most 1 for every `kernel`, singular values near 1."""
    if kernel.shape[0] < kernel.shape[1]:
        return transpose(orthogonal(transpose(kernel)))
    kernel = rescaled(kernel)
    return matmul(kernel, orthogonalizer(gram(kernel)))


def orthogonal_all(*kernels: Float[Array, "_ _ *batch"]) -> list[Float[Array, "_ _ *batch"]]:
    """Apply `orthogonal` to each kernel. Kernels of one shape form a batch (wide ones are transposed): on a GPU, a batch of
    small products takes as long as one."""
    tall = [k if k.shape[0] >= k.shape[1] else transpose(k) for k in kernels]
    made = {}
    for shape in dict.fromkeys(k.shape for k in tall):
        alike = [i for i, k in enumerate(tall) if k.shape == shape]
        # vmap, because `orthogonal` of a batch is written for small matrices, and these may be large
        made |= zip(alike, jax.vmap(orthogonal)(jnp.stack([tall[i] for i in alike])), strict=True)
    return [made[i] if made[i].shape == k.shape else transpose(made[i]) for i, k in enumerate(kernels)]


def rescaled(kernel: Float[Array, "m n *batch"]) -> Float[Array, "m n *batch"]:
    """Divide each matrix by its largest absolute entry, so that its Gram matrix cannot overflow or underflow. Zero stays zero.

    Later steps do not depend on the scale, so the divisor needs no gradient.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(kernel), axis=(0, 1), keepdims=True))
    return kernel / jnp.where(largest > 0, largest, 1.0)


def projection(basis: Float[Array, "m r *batch"]) -> Float[Array, "m m *batch"]:
    """Return R R^T for an R that `orthogonal` returned: symmetric, eigenvalues in [0, 1], near the projection onto R's span."""
    return gram(transpose(basis))


def orthogonal_conv_kernel(
    dense: Float[Array, "m n *batch"], vertical: Float[Array, "w r *batch"], horizontal: Float[Array, "w r *batch"]
) -> Float[Array, "2 2 m n *batch"]:
    """Return a 2 x 2 kernel from m to n channels whose convolution has norm at most 1 (see the module docstring).

    Args:
        dense: the factor that changes the number of channels.
        vertical, horizontal: their spans are shifted by one pixel along each axis; w is the larger of m and n.
    """
    h, *bases = orthogonal_all(dense, vertical, horizontal)
    return shifting_kernel(h, *(projection(basis) for basis in bases))


def shifting_kernel(
    h: Float[Array, "m n *batch"], p: Float[Array, "w w *batch"], q: Float[Array, "w w *batch"]
) -> Float[Array, "2 2 m n *batch"]:
    """Return the 2 x 2 kernel of the product of h, (I - p) + p * (vertical shift) and (I - q) + q * (horizontal shift).

    p and q act on the wider side of h: the input or the output.
    """
    if h.shape[0] > h.shape[1]:
        hp, hq = matmul(p, h), matmul(q, h)
        both = matmul(q, hp)
    else:
        hp, hq = matmul(h, p), matmul(h, q)
        both = matmul(hp, q)
    return jnp.stack([jnp.stack([h - hp - hq + both, hq - both]), jnp.stack([hp - both, both])])


def group_sort(x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """Sort the channels in pairs (GroupSort(2), Anil et al., 2019): a permutation, which keeps norm and gradient norm.

    Channel c is paired with c + C / 2, because halves are fastest. A grouped layer that follows needs both in one group.
    """
    a, b = jnp.split(x, 2, axis=-1)
    swap = a > b
    return jnp.concatenate([jnp.where(swap, b, a), jnp.where(swap, a, b)], axis=-1)


def orthogonal_init(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "m n *batch"]:
    """Return a random (semi-)orthogonal matrix. A batch of small ones gets normal entries of the same size, which the layer
    itself makes nearly orthogonal (compiling a batched QR takes seconds)."""
    m, n, *batch = shape
    if batch:
        return jax.random.normal(key, shape) / max(m, n) ** 0.5
    q, _ = jnp.linalg.qr(jax.random.normal(key, (max(m, n), min(m, n))))
    return q if m >= n else q.T


def mirror_init(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "m 2*m"]:
    """Return the initial kernel [I, -I]. `group_sort` turns its outputs (x, -x) into (-|x|, |x|)."""
    eye = jnp.eye(shape[0])
    return jnp.concatenate([eye, -eye], axis=1)


def still_init(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "w m *batch"]:
    """Return the initial basis of shifts, [I; I]. Its span is orthogonal to every (x, -x), so (x, -x) is not shifted."""
    eye = jnp.eye(shape[1]).reshape(shape[1], shape[1], *(1,) * (len(shape) - 2))
    return jnp.broadcast_to(jnp.concatenate([eye, eye]), shape)


class LipschitzDense(nn.Module):
    """A dense layer that is 1-Lipschitz in the Euclidean norm."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch m"]) -> Float[Array, "*batch n"]:
        m, n = x.shape[-1], self.features
        kernel = rescaled(self.param("kernel", orthogonal_init, (m, n)))
        bias = self.param("bias", nn.initializers.zeros, (n,))
        # applying the kernel and its orthogonalizer in turn is cheaper than forming their product
        if m >= n:
            return (x @ kernel) @ orthogonalizer(gram(kernel)) + bias
        return (x @ orthogonalizer(gram(kernel.T)).T) @ kernel + bias


class LipschitzScalars(nn.Module):
    """`features` scalar outputs. Each one is a 1-Lipschitz function of the input; the vector of all outputs may not be."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch m"]) -> Float[Array, "*batch n"]:
        kernel = self.param("kernel", orthogonal_init, (x.shape[-1], self.features))
        kernel = rescaled(kernel[:, None])[:, 0]  # each column is rescaled as a separate matrix
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        squares = jnp.sum(kernel**2, axis=0)
        return x @ (kernel * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))) + bias


class LipschitzConv(nn.Module):
    """A 2 x 2 convolution with SAME zero padding that is 1-Lipschitz as a map between feature maps. On a 1x1 map it is only a
    matrix, because the other factors could only shrink its values."""

    features: int
    dense_init: Callable = orthogonal_init
    shift_init: Callable = orthogonal_init

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W O"]:
        m, n = x.shape[-1], self.features
        wide = max(m, n)
        dense = self.param("dense", self.dense_init, (m, n))
        bias = self.param("bias", nn.initializers.zeros, (n,))
        if x.shape[1:3] == (1, 1):  # a 1x1 map, where no shift applies
            return x @ orthogonal(dense) + bias
        vertical = self.param("vertical", self.shift_init, (wide, wide // 2))
        horizontal = self.param("horizontal", self.shift_init, (wide, wide // 2))
        return conv2d(x, orthogonal_conv_kernel(dense, vertical, horizontal), padding="SAME") + bias
