"""Stacked frames, each stored only once.

An observation is a stack of a game's last frames, so each frame is part of several observations. Rollouts and replay buffers
store each frame once and build the stacks when they are read.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Num, UInt8

STACK = 4  # frames per stack


class Newest(NamedTuple):
    """The stored part of a stack: its newest frame, and `age`: the number of earlier frames in the stack from the same game. (A
    game's first frame fills the rest of the stack.)"""

    frame: UInt8[Array, "*batch H W"]
    age: Int8[Array, "*batch"]


@flax.struct.dataclass
class Stacks:
    """Observations of T steps of B environments, [T, B, S, H, W].

    Index them by step, or by step and environment, with integers or integer arrays. `frames` begins S - 1 steps before the
    first observation, so F = T + S - 1.
    """

    frames: UInt8[Array, "F B H W"]
    age: Int8[Array, "T B"]

    def __len__(self) -> int:
        return len(self.age)

    def __getitem__(self, index: Any) -> UInt8[Array, "*index S H W"]:
        if not isinstance(index, tuple):
            index = jnp.asarray(index)[..., None], jnp.arange(self.age.shape[1])
        t, env = jnp.broadcast_arrays(*index)
        t = jnp.where(t < 0, t + len(self), t)
        before = len(self.frames) - len(self.age)
        back = jnp.minimum(jnp.arange(before, -1, -1), self.age[t, env][..., None])
        return self.frames[t[..., None] + before - back, env[..., None]]

    __iter__ = None  # Python would iterate until an index raises, and in JAX none does

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[jnp.arange(len(self))], dtype)

    def newest(self) -> Newest:
        """Return what to store of these observations."""
        return Newest(self.frames[len(self.frames) - len(self.age) :], self.age)


def observations(first: Num[Array, "B *obs"], kept: Any, last: Any) -> Stacks | Num[Array, "R B *obs"]:
    """Return a rollout's R = T + 1 observations: from the `first` one, and what was stored of the first T and of the `last`."""
    kept = jax.tree.map(lambda x, after: jnp.concatenate([x, after[None]]), kept, last)
    if not isinstance(kept, Newest):
        return kept
    before = jnp.moveaxis(first[:, :-1], 1, 0)
    return Stacks(jnp.concatenate([before, kept.frame]), kept.age)
