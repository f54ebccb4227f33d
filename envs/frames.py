"""Stacked frames that are stored once each.

An agent sees the last frames of a game, stacked, so that each frame is seen as often as a stack is high. What holds many
observations (a rollout, a replay buffer) stores it once, and builds stacks where they are looked at.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Num, UInt8

STACK = 4  # frames of a stack
SMALLEST_FRAME = 36  # pixels along each axis that an image needs for the encoder of frames; what is smaller is a grid of cells


class Newest(NamedTuple):
    """What is stored of a stack: its last frame, and how many frames of the same game stand before that one, as far as the
    stack reaches. (Before a game's first frame stands that frame again.)"""

    frame: UInt8[Array, "*batch H W"]
    age: Int8[Array, "*batch"]


@flax.struct.dataclass
class Stacks:
    """Observations of T steps of B environments, [T, B, S, H, W], indexed as an array is, by whole numbers or arrays of those:
    of steps, or of steps and environments.

    `frames` begins S - 1 steps before the first observation: F = T + S - 1.
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

    __iter__ = None  # Python would go through indices until one raises, and in JAX none does

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[jnp.arange(len(self))], dtype)

    def newest(self) -> Newest:
        """What to store of them."""
        return Newest(self.frames[len(self.frames) - len(self.age) :], self.age)


def observations(first: Num[Array, "B *obs"], kept: Any, last: Any) -> Stacks | Num[Array, "R B *obs"]:
    """The observations of a rollout: `kept` is what was stored of T of them, `last` of one more, and `first` is the first."""
    kept = jax.tree.map(lambda x, after: jnp.concatenate([x, after[None]]), kept, last)
    if not isinstance(kept, Newest):
        return kept
    before = jnp.moveaxis(first[:, :-1], 1, 0)
    return Stacks(jnp.concatenate([before, kept.frame]), kept.age)
