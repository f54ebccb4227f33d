"""Measurements that not every update makes, because they are too dear, or because there is nothing to measure."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

MEASURED = ":measured"  # after a name, or after the folder of names ("a/b/"): 0 where they were not measured; not for the log


def occasionally(iteration: Array, every: int, measure: Callable[[], dict[str, Array]], prefix: str) -> dict[str, Array]:
    """What `measure` returns, under names with the prefix, in iterations 0, `every`, 2 `every`, ...; nothing, at no cost, in
    the others (see `only_measured`)."""
    due = iteration % every == 0
    unmeasured = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure))
    return jax.lax.cond(due, measure, lambda: unmeasured) | {prefix + MEASURED: due.astype(jnp.float32)}


def only_measured(values: dict[str, Array | np.ndarray]) -> dict[str, Array | np.ndarray]:
    """The values, without those that were not measured and without the marks that say so."""
    missing = {name.removesuffix(MEASURED) for name, value in values.items() if name.endswith(MEASURED) and value == 0}
    folders = tuple(name for name in missing if name.endswith("/"))
    kept = {name: x for name, x in values.items() if not name.endswith(MEASURED) and not name.startswith(folders)}
    return {name: x for name, x in kept.items() if name not in missing}
