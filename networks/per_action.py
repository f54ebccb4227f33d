"""Convolutions with one kernel per action, computed only for the action taken.

Each sample takes its action's kernels and applies them as sums of products. Computing all A actions to select one would cost
A times as much time and memory.

The convolutions are grouped, and groups are the last axis of a map: channel k * G + g is the k-th of group g. The groups fill a
CPU's vector registers, so the small products of kernels and pixels need neither a rearrangement nor batched matrix products,
which are several times slower there.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TERMS = 8  # of a sum in one loop of a CPU's program


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
    return sum_by_action(g, action, table.shape[0]), None


of_action.defvjp(lambda table, action: (of_action(table, action), (table, action)), _of_action_backward)


def sum_by_action(x: Float[Array, "N *shape"], action: Int[Array, " N"], num_actions: int) -> Float[Array, "A *shape"]:
    """Sum x over the samples of each action."""
    # a product is deterministic; the gradient of indexing is not, because a GPU varies the order of the sum
    taken = jax.nn.one_hot(action, num_actions, dtype=x.dtype)
    return jnp.matmul(taken.T, x.reshape(x.shape[0], -1), precision="highest").reshape(num_actions, *x.shape[1:])


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


def applied(
    kernels: Float[Array, "A o c G"], action: Int[Array, " N"], x: Float[Array, "N h w c G"]
) -> Float[Array, "N h w o G"]:
    """Multiply each pixel's channels by the kernels of the sample's action, group by group."""
    if x.shape[1:3] == (1, 1):
        return vector_product(kernels, action, x[:, 0, 0])[:, None, None]
    return product(of_action(kernels, action), x)


@jax.custom_vjp
def vector_product(
    kernels: Float[Array, "A o c G"], action: Int[Array, " N"], x: Float[Array, "N c G"]
) -> Float[Array, "N o G"]:
    """Compute `applied` for a map of one pixel. A sample's kernels are then much larger than the sample, and on a CPU writing
    them out takes ten times as long as the products."""
    return jax.lax.platform_dependent(kernels, action, x, cpu=cpu_vector_product, default=gathered_vector_product)


def gathered_vector_product(
    kernels: Float[Array, "A o c G"], action: Int[Array, " N"], x: Float[Array, "N c G"]
) -> Float[Array, "N o G"]:
    """Compute `vector_product` from a copy of each sample's kernels."""
    return summed_product(kernels[action], x[:, None, None])[:, 0, 0]


def cpu_vector_product(
    kernels: Float[Array, "A o c G"], action: Int[Array, " N"], x: Float[Array, "N c G"]
) -> Float[Array, "N o G"]:
    """Compute `vector_product` term by term. XLA reads the kernels where they are if no loop has more than `TERMS` terms, and
    no other product reads the same ones, hence the first barrier."""
    kernels, x = jax.lax.optimization_barrier((kernels, x))
    total, terms = jnp.zeros((), x.dtype), range(x.shape[1])
    for start in terms[::TERMS]:
        part = sum(kernels[:, :, i][action] * x[:, None, i] for i in terms[start : start + TERMS])
        total = jax.lax.optimization_barrier(total + part)
    return total


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def vector_outer_product(
    y: Float[Array, "N o G"], action: Int[Array, " N"], x: Float[Array, "N c G"], num_actions: int
) -> Float[Array, "A o c G"]:
    """Sum the outer products of y's and x's channels over the samples of each action, group by group."""
    cpu = partial(cpu_vector_outer_product, num_actions=num_actions)
    gathered = partial(gathered_vector_outer_product, num_actions=num_actions)
    return jax.lax.platform_dependent(y, action, x, cpu=cpu, default=gathered)


def gathered_vector_outer_product(
    y: Float[Array, "N o G"], action: Int[Array, " N"], x: Float[Array, "N c G"], num_actions: int
) -> Float[Array, "A o c G"]:
    """Compute `vector_outer_product` from each sample's outer product."""
    return sum_by_action(y[:, :, None] * x[:, None], action, num_actions)


def cpu_vector_outer_product(
    y: Float[Array, "N o G"], action: Int[Array, " N"], x: Float[Array, "N c G"], num_actions: int
) -> Float[Array, "A o c G"]:
    """Compute `vector_outer_product` in a loop that adds `TERMS` samples of one action to its sum, which stays in the cache."""
    n, order = action.shape[0], jnp.argsort(action)
    count = jnp.bincount(action, length=num_actions)
    rounds = -(-count // TERMS)  # of each action; zeros fill the last one
    most = -(-n // TERMS) + num_actions
    shifts = (jnp.cumsum(rounds) - rounds) * TERMS - (jnp.cumsum(count) - count)
    place = jnp.arange(n) + shifts[action[order]]
    source = jnp.full(most * TERMS, n).at[place].set(order, unique_indices=True)
    y, x = (jnp.take(a, source, axis=0, mode="fill", fill_value=0.0).reshape(most, TERMS, *a.shape[1:]) for a in (y, x))

    def add(total, this):
        y, x, action = this
        new = total[action] + sum(y[i, :, None] * x[i, None] for i in range(TERMS))
        return jax.lax.dynamic_update_index_in_dim(total, new, action, 0), None

    zeros = jnp.zeros((num_actions, y.shape[2], *x.shape[2:]), x.dtype)
    actions = jnp.repeat(jnp.arange(num_actions), rounds, total_repeat_length=most)
    return jax.lax.scan(add, zeros, (y, x, actions))[0]


# the gradients are again these two products, so gradients of every order are fast
def _vector_product_backward(residuals, g):
    kernels, action, x = residuals
    return vector_outer_product(g, action, x, len(kernels)), None, vector_product(kernels.swapaxes(1, 2), action, g)


def _vector_outer_product_backward(_, residuals, g):
    y, action, x = residuals
    return vector_product(g, action, x), None, vector_product(g.swapaxes(1, 2), action, y)


vector_product.defvjp(lambda *inputs: (vector_product(*inputs), inputs), _vector_product_backward)
vector_outer_product.defvjp(lambda *inputs: (vector_outer_product(*inputs), inputs[:3]), _vector_outer_product_backward)
