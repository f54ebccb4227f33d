"""Measurements that are too dear for every update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

MEASURED = "measured"  # after a prefix: 0 in updates in which nothing with that prefix was measured; not for the log


def occasionally(iteration: Array, every: int, measure: Callable[[], dict[str, Array]], prefix: str) -> dict[str, Array]:
    """What `measure` returns, under names with the prefix, in iterations 0, `every`, 2 `every`, ...; nothing, at no cost, in
    the others (see `MEASURED`)."""
    due = iteration % every == 0
    unmeasured = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(measure))
    return jax.lax.cond(due, measure, lambda: unmeasured) | {prefix + MEASURED: due.astype(jnp.float32)}
