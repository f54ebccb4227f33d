"""Atari games in envpool: their protocol, and frames stacked on the device."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8, UInt8

from envs.frames import STACK
from envs.pool import Pool, PoolState, env_seeds, module_of, pool_ids
from envs.protocol import Timestep


class AtariProtocol(NamedTuple):
    """Randomness of an Atari game: the probability that a frame repeats the previous frame's action (sticky actions), and the
    maximum number of no-ops before a game and after each lost life (drawn uniformly from 1 to this)."""

    repeat_action_probability: float
    noop_max: int


PLAIN, STOCHASTIC = AtariProtocol(0.0, 30), AtariProtocol(0.3, 60)  # envpool's default, and the paper's stochastic protocol


def atari_ids() -> tuple[str, ...]:
    """Return the ids of envpool's Atari games."""
    return tuple(env_id for env_id in pool_ids() if module_of(env_id) == "atari")


class FrameState(NamedTuple):
    """A pool's state, each game's stack of frames, and `age`: the number of earlier frames in the stack from the same game."""

    pool: PoolState
    stack: UInt8[Array, "B S H W"]
    age: Int8[Array, " B"]


class FramePool(Pool):
    """A pool of games whose single frames are stacked on the device. The observations equal envpool's own stacks, for a
    quarter of the copied bytes. A game's first stack repeats its first frame; a lost life does not start a new game.

    Args: see `Pool`.
    """

    stacks_frames = True

    def __init__(self, *args, **options):
        super().__init__(*args, stack_num=1, **options)

    def reset(self) -> tuple[FrameState, UInt8[Array, "B S H W"]]:
        """See `Pool.reset`."""
        state, frame = super().reset()
        stack = jnp.repeat(frame, STACK, axis=1)
        return FrameState(state, stack, jnp.zeros(self.num_envs, jnp.int8)), jnp.array(stack)

    def send(self, state: FrameState, action: Int[Array, " B"]) -> FrameState:
        """See `Pool.send`."""
        return state._replace(pool=super().send(state.pool, action))

    def receive(self, state: FrameState) -> tuple[FrameState, Timestep]:
        """See `Pool.receive`."""
        pool, after = super().receive(state.pool)
        moved = jnp.concatenate([state.stack[:, 1:], after.obs], axis=1)
        stack = jnp.where(pool.begins[:, None, None, None], after.obs, moved)
        age = jnp.where(pool.begins, 0, jnp.minimum(state.age + 1, STACK - 1)).astype(jnp.int8)
        return FrameState(pool, stack, age), after._replace(obs=stack)


def make_machado_pool(env_id: str, num_envs: int, seed: int, stepping: Literal["auto", "xla", "callback"] = "auto") -> Pool:
    """Create a pool of Atari games with the evaluation protocol of Machado et al. (2018, arXiv 1709.06009): sticky actions with
    probability 0.25, all 18 actions, and no knowledge of lives. Losing one does not end an episode, and fire is not pressed
    afterwards. (Their episodes end after 5 minutes and skip 5 frames; as is usual today, ours end after 30 and skip 4.)

    Args:
        env_id, num_envs, seed, stepping: see `envs.registry.make_pool`.
    """
    options = {"repeat_action_probability": 0.25, "full_action_space": True, "episodic_life": False, "reward_clip": False}
    options |= {"noop_max": 1, "use_fire_reset": False}
    return FramePool(env_id, env_seeds(seed, num_envs), (-np.inf, np.inf), stepping, **options)
