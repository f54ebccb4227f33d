"""Norms and histograms of the layers of parameters or gradients."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Num

from utils.occasionally import occasionally

SMALLEST, LARGEST = -30, 10  # exponents of the smallest and the largest bin edge
_POWERS = 2.0 ** np.arange(SMALLEST, LARGEST + 1)
EDGES = np.concatenate([-_POWERS[::-1], _POWERS])
"""Bin edges: powers of 2 and their negatives. Values near 0 fall into the middle bin, large ones into the outermost bins."""


def histogram(x: Num[Array, "..."]) -> Int[Array, " bins"]:
    """Count the values in each of the bins between `EDGES`. NaN is in no bin."""
    x = x.reshape(-1)
    _, exponent = jnp.frexp(x)  # |x| lies in [2^(exponent - 1), 2^exponent)
    exponent = jnp.where(jnp.isinf(x), LARGEST, exponent)
    rank = jnp.where(x == 0, 0, jnp.clip(exponent - SMALLEST, 0, len(_POWERS) - 1))
    index = len(_POWERS) - 1 + jnp.where(x < 0, -rank, rank)
    return jnp.zeros(len(EDGES) - 1, jnp.int32).at[index].add((~jnp.isnan(x)).astype(jnp.int32))


def statistics(tree: Any, prefix: str) -> dict[str, Array]:
    """Return the norm and the histogram of each array of a tree, named by `prefix` and the array's path."""
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = prefix + jax.tree_util.keystr(path, simple=True, separator="/").replace("/params/", "/")
        found |= {f"{name}/norm": jnp.sqrt(jnp.sum(x**2)), name: histogram(x).astype(jnp.float32)}
    return found


def track_gradients(grads: Any, iteration: Array, args: Any, part: Literal["losses", "dreams"] = "losses") -> dict[str, Array]:
    """Return the norm of a minibatch's gradient over all parameters, before clipping. With `--track-grads`, every
    `--track-every` updates, add the statistics of each array. `part` is the loss: on real data, or in dreams."""
    norm = {f"{part}/grad_norm": optax.global_norm(grads)}
    if not args.track_grads:
        return norm
    prefix = "grads/" if part == "losses" else f"grads/{part}/"
    return norm | occasionally(iteration, args.track_every, lambda: statistics(grads, prefix), prefix)
