"""Convolutions with one kernel for each action, of which only that of the action taken is computed.

Each sample gathers its action's kernels, and a few sums of products do the rest. Computing all A actions to select one would
cost A times as much, in time and in memory.

The convolutions are grouped, and the groups are the last axis of a map: channel k * G + g is the k-th of group g. They
fill a vector register of a CPU, so that tiny products of kernels and pixels need neither batched matrix products, which are
several times slower there, nor any rearrangement.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def groups(channels: int) -> int:
    """How many groups the channels of a latent form in the last convolution of the transition: 16, as in the paper, or more
    where a group would have more than 4 of them."""
    return max(16, channels // 4)


def by_group(x: Float[Array, "N h w C"]) -> Float[Array, "N h w c G"]:
    """Maps in groups. Channels C / 2 apart, which `group_sort` pairs, are in the same group."""
    return x.reshape(*x.shape[:3], -1, groups(x.shape[-1] // 2))


def shift(x: Float[Array, "N h w c G"], rows: int, cols: int) -> Float[Array, "N h w c G"]:
    """The maps moved up and to the left, zeros following."""
    return jnp.pad(x[:, rows:, cols:], ((0, 0), (0, min(rows, x.shape[1])), (0, min(cols, x.shape[2])), (0, 0), (0, 0)))


@jax.custom_vjp
def of_action(table: Float[Array, "A *shape"], action: Int[Array, " N"]) -> Float[Array, "N *shape"]:
    """The entries of the actions."""
    return table[action]


def _of_action_backward(residuals, g):
    table, action = residuals
    # a product is the same on every run; the gradient of indexing adds up in an order which a GPU does not keep
    taken = jax.nn.one_hot(action, table.shape[0], dtype=g.dtype)
    return jnp.matmul(taken.T, g.reshape(g.shape[0], -1), precision="highest").reshape(table.shape), None


of_action.defvjp(lambda table, action: (of_action(table, action), (table, action)), _of_action_backward)


@jax.custom_vjp
def product(kernels: Float[Array, "N o c G"], x: Float[Array, "N h w c G"]) -> Float[Array, "N h w o G"]:
    """The channels of each pixel, group by group, times the kernels of the sample: term by term on a CPU, where XLA makes one
    loop of that; on a GPU it would first write out what enters each term."""
    return jax.lax.platform_dependent(kernels, x, cpu=cpu_product, default=summed_product)


def summed_product(kernels: Float[Array, "N o c G"], x: Float[Array, "N h w c G"]) -> Float[Array, "N h w o G"]:
    """`product` as one sum."""
    return jnp.sum(kernels[:, None, None] * x[:, :, :, None], axis=4)


def cpu_product(kernels: Float[Array, "N o c G"], x: Float[Array, "N h w c G"]) -> Float[Array, "N h w o G"]:
    """`product` term by term."""
    kernels, x = kernels[:, None, None], jax.lax.optimization_barrier(x)
    # the barriers, here and below, keep XLA from computing x, or the result, anew for each of the terms that it enters
    return jax.lax.optimization_barrier(sum(kernels[..., i, :] * x[:, :, :, None, i] for i in range(x.shape[3])))


@jax.custom_vjp
def outer_product(y: Float[Array, "N h w o G"], x: Float[Array, "N h w c G"]) -> Float[Array, "N o c G"]:
    """The outer products of y's and x's channels, group by group, summed over the pixels (all h * w terms are unrolled)."""
    y, x = jax.lax.optimization_barrier((y, x))
    total = jnp.zeros((), x.dtype)
    for i in range(x.shape[1]):  # row by row: XLA is slower on a sum over all pixels at once
        row = sum(y[:, i, j, :, None] * x[:, i, j, None] for j in range(x.shape[2]))
        total = jax.lax.optimization_barrier(total + row)
    return total


# gradients of each are products of both, so that those of any order are as fast
product.defvjp(
    lambda kernels, x: (product(kernels, x), (kernels, x)),
    lambda residuals, g: (outer_product(g, residuals[1]), product(residuals[0].swapaxes(1, 2), g)),
)
outer_product.defvjp(
    lambda y, x: (outer_product(y, x), (y, x)),
    lambda residuals, g: (product(g, residuals[1]), product(g.swapaxes(1, 2), residuals[0])),
)
