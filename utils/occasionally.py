"""Measurements that only some updates make, because they are expensive or because there is not always something to measure."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

MEASURED = ":measured"  # name + this is 0 if that metric (or all under a prefix "a/b/") was not measured; never logged


def occasionally(iteration: Array, every: int, measure: Callable[[], dict[str, Array]], prefix: str) -> dict[str, Array]:
    """Return `measure()`, whose names start with `prefix`, in iterations 0, `every`, 2 `every`, ... In the others, return zeros
    marked as not measured, without computing (except under vmap); see `only_measured`."""
    due = iteration % every == 0
    unmeasured = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure))
    return jax.lax.cond(due, measure, lambda: unmeasured) | {prefix + MEASURED: due.astype(jnp.float32)}


def only_measured(values: dict[str, Array | np.ndarray]) -> dict[str, Array | np.ndarray]:
    """Drop the values that were not measured, and the `MEASURED` marks."""
    missing = {name.removesuffix(MEASURED) for name, value in values.items() if name.endswith(MEASURED) and value == 0}
    folders = tuple(name for name in missing if name.endswith("/"))
    kept = {name: x for name, x in values.items() if not name.endswith(MEASURED) and not name.startswith(folders)}
    return {name: x for name, x in kept.items() if name not in missing}
