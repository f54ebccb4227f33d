"""Convolutions with one kernel for each action, of which only that of the action taken is computed.

Each sample gathers its action's kernels, and a few batched products do the rest. Computing all A actions to select one would
cost A times as much, in time and in memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GROUPS = 16  # of the channels, in the last convolution of the transition


def by_group(x: Float[Array, "N h w C"]) -> Float[Array, "N G c hw"]:
    """Maps in groups, the pixels last: the layout in which products with a kernel of each sample's own are fast.

    Channel k * G + g is the k-th of group g, so that both of a pair that `group_sort` sorted are in the same group.
    """
    n, height, width, channels = x.shape
    return x.reshape(n, height * width, channels // GROUPS, GROUPS).transpose(0, 3, 2, 1)


def as_latent(x: Float[Array, "N G o hw"], shape: tuple[int, ...]) -> Float[Array, "N h w C"]:
    """The inverse of `by_group`, for G * o channels."""
    # the barrier keeps XLA from computing what made x, or its gradient, anew for every mixture component
    return jax.lax.optimization_barrier(x).transpose(0, 3, 2, 1).reshape(shape)


def shift(x: Float[Array, "N G c hw"], width: int, rows: int, cols: int) -> Float[Array, "N G c hw"]:
    """The maps moved up and to the left, zeros following."""
    pixels = min(rows * width + cols, x.shape[-1])
    moved = jnp.pad(x[..., pixels:], ((0, 0), (0, 0), (0, 0), (0, pixels)))
    return jnp.where(jnp.arange(x.shape[-1]) % width < width - cols, moved, 0.0)


def of_action(table: Float[Array, "A *shape"], action: Int[Array, " N"]) -> Float[Array, "N *shape"]:
    """The entries of the actions. A product, whose gradient is the same on every run; that of indexing adds up in an order
    which a GPU does not keep."""
    taken = jax.nn.one_hot(action, table.shape[0], dtype=table.dtype)
    return jnp.matmul(taken, table.reshape(table.shape[0], -1), precision="highest").reshape(-1, *table.shape[1:])


@jax.custom_vjp
def product(
    kernels: Float[Array, "A G o c"], x: Float[Array, "N G c hw"], action: Int[Array, " N"]
) -> Float[Array, "N G o hw"]:
    """Each sample's maps, group by group, times the kernel of its action."""
    return kernels[action] @ x


def _product_backward(residuals, g):
    kernels, x, action = residuals
    # with the kernels transposed first, the product has the layout [m, k] @ [k, n], in which XLA's CPU backend is fast
    dx = product(kernels.swapaxes(-1, -2), g, action)
    (dkernels,) = jax.linear_transpose(partial(of_action, action=action), kernels)(jnp.einsum("ngop,ngcp->ngoc", g, x))
    return dkernels, dx, None


product.defvjp(lambda kernels, x, action: (product(kernels, x, action), (kernels, x, action)), _product_backward)
