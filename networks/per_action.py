"""Convolutions with one kernel per action, computed only for the action taken.

Each sample gathers its action's kernels and applies them as sums of products. Computing all A actions to select one would cost
A times as much time and memory.

The convolutions are grouped, and groups are the last axis of a map: channel k * G + g is the k-th of group g. The groups fill a
CPU's vector registers, so the small products of kernels and pixels need neither a rearrangement nor batched matrix products,
which are several times slower there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def groups(channels: int) -> int:
    """Return the number of groups of a latent's channels in the transition's last convolution: 16, as in the paper, or more if
    a group would have more than 4 channels."""
    return max(16, channels // 4)


def by_group(x: Float[Array, "N h w C"]) -> Float[Array, "N h w c G"]:
    """Split the channels into groups. Channels C / 2 apart, which `group_sort` pairs, are in the same group."""
    return x.reshape(*x.shape[:3], -1, groups(x.shape[-1] // 2))


def shift(x: Float[Array, "N h w c G"], rows: int, cols: int) -> Float[Array, "N h w c G"]:
    """Move the maps up by `rows` and left by `cols` pixels, and fill with zeros."""
    return jnp.pad(x[:, rows:, cols:], ((0, 0), (0, min(rows, x.shape[1])), (0, min(cols, x.shape[2])), (0, 0), (0, 0)))


@jax.custom_vjp
def of_action(table: Float[Array, "A *shape"], action: Int[Array, " N"]) -> Float[Array, "N *shape"]:
    """Return the table entry of each sample's action."""
    return table[action]


def _of_action_backward(residuals, g):
    table, action = residuals
    # a product is deterministic; the gradient of indexing is not, because a GPU varies the order of the sum
    taken = jax.nn.one_hot(action, table.shape[0], dtype=g.dtype)
    return jnp.matmul(taken.T, g.reshape(g.shape[0], -1), precision="highest").reshape(table.shape), None


of_action.defvjp(lambda table, action: (of_action(table, action), (table, action)), _of_action_backward)


@jax.custom_vjp
def product(kernels: Float[Array, "N o c G"], x: Float[Array, "N h w c G"]) -> Float[Array, "N h w o G"]:
    """Multiply each pixel's channels by the sample's kernels, group by group. A CPU does so term by term, which XLA fuses into
    one loop. On a GPU, XLA would first write out the inputs of each term."""
    return jax.lax.platform_dependent(kernels, x, cpu=cpu_product, default=summed_product)


def summed_product(kernels: Float[Array, "N o c G"], x: Float[Array, "N h w c G"]) -> Float[Array, "N h w o G"]:
    """Compute `product` as one sum."""
    return jnp.sum(kernels[:, None, None] * x[:, :, :, None], axis=4)


def cpu_product(kernels: Float[Array, "N o c G"], x: Float[Array, "N h w c G"]) -> Float[Array, "N h w o G"]:
    """Compute `product` term by term."""
    kernels, x = kernels[:, None, None], jax.lax.optimization_barrier(x)
    # the barriers, here and below, keep XLA from recomputing x, or the result, for each term that uses it
    return jax.lax.optimization_barrier(sum(kernels[..., i, :] * x[:, :, :, None, i] for i in range(x.shape[3])))


@jax.custom_vjp
def outer_product(y: Float[Array, "N h w o G"], x: Float[Array, "N h w c G"]) -> Float[Array, "N o c G"]:
    """Sum the outer products of y's and x's channels over the pixels, group by group (all h * w terms are unrolled)."""
    y, x = jax.lax.optimization_barrier((y, x))
    total = jnp.zeros((), x.dtype)
    for i in range(x.shape[1]):  # row by row, because XLA is slower on one sum over all pixels
        row = sum(y[:, i, j, :, None] * x[:, i, j, None] for j in range(x.shape[2]))
        total = jax.lax.optimization_barrier(total + row)
    return total


# the gradients are again these two products, so gradients of every order are fast
product.defvjp(
    lambda kernels, x: (product(kernels, x), (kernels, x)),
    lambda residuals, g: (outer_product(g, residuals[1]), product(residuals[0].swapaxes(1, 2), g)),
)
outer_product.defvjp(
    lambda y, x: (outer_product(y, x), (y, x)),
    lambda residuals, g: (product(g, residuals[1]), product(g.swapaxes(1, 2), residuals[0])),
)
