"""envpool environments (Atari and three small classic ones) with pure, jittable steps."""

import functools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Int8, UInt8

from envs.frames import STACK
from envs.protocol import DEVICES, EpisodeStats, Timestep


class AtariProtocol(NamedTuple):
    """Randomness of an Atari game: the probability that a frame repeats the previous frame's action (sticky actions), and the
    maximum number of no-ops at the start of a game (drawn uniformly from 1 to this)."""

    repeat_action_probability: float
    noop_max: int


PLAIN, STOCHASTIC = AtariProtocol(0.0, 30), AtariProtocol(0.3, 60)  # envpool's default, and the paper's stochastic protocol
CLASSIC = {"Acrobot-v1": (-1.0, 0.0), "CartPole-v1": (0.0, 1.0), "Catch-v0": (-1.0, 1.0)}  # id: range of its rewards


@functools.cache
def atari_ids() -> tuple[str, ...]:
    """Return the ids of envpool's Atari games with pixel observations."""
    import envpool  # importing envpool takes seconds, so it happens only where needed, here and below

    return tuple(sorted(env_id for env_id, spec in envpool.registration.registry.specs.items() if spec[0] == "envpool.atari"))


def env_seeds(seed: int, num_envs: int, iteration: int = 0) -> list[int]:
    """Return one seed per environment. Runs with different seeds share none of them, and a run resumed at `iteration` gets
    other seeds than at its start.

    By default envpool seeds environment i with seed + i, so runs with seeds s and s + 1 would share all environments but one.
    """
    entropy = [seed, iteration] if iteration else seed
    seeds = np.random.SeedSequence(entropy).generate_state(num_envs) >> 1  # envpool's seeds have 31 bits
    return [int(s) for s in seeds]


say_once = functools.cache(partial(print, flush=True))


class PoolState(NamedTuple):
    """State of a `Pool`. `handle` orders the calls to the pool: dropping or reusing an old handle gives wrong results, not an
    error. (Python callbacks are ordered anyway and do not use it.)"""

    handle: UInt8[Array, " H"]  # 8 bytes on each device
    over: Bool[Array, " B"]  # the last observation ended an agent's episode (a lost life counts)
    begins: Bool[Array, " B"]  # the last observation is the first one of a game
    lives: Int[Array, " B"]  # lives left, in games with lives
    episode: EpisodeStats


class Pool:
    """An envpool pool that implements `envs.protocol.Env`.

    A pool belongs to one program: its address is compiled into the function that jits `step`. The emulators' state lives in the
    pool, so it cannot be copied or saved.

    Args:
        env_id: see `make_pool`.
        seeds: one per environment.
        reward_range: range of the rewards that the pool returns.
        stepping: `xla` steps the pool inside the compiled program, with envpool's XLA operation (Linux only); `callback` calls
            Python at every step, in order; `auto` uses `xla` if it is available. Both return the same values.
        midway: the environments belong to a resumed run; see `EpisodeStats.to_count`.
        num_devices: number of devices. Each one steps an equal part of the environments, in its own pool (see `utils.devices`).
        options: passed to envpool.

    Raises:
        RuntimeError: `xla` or several devices are requested, but envpool has no XLA operation on this system.
        ValueError: several devices are requested with `callback`.
    """

    saveable = False
    stacks_frames = False

    def __init__(
        self,
        env_id: str,
        seeds: list[int],
        reward_range: tuple[float, float],
        stepping: Literal["auto", "xla", "callback"] = "auto",
        midway: bool = False,
        num_devices: int = 1,
        **options,
    ):
        import envpool

        if stepping == "callback" and num_devices > 1:
            raise ValueError("stepping='callback': supports one device only; use 'auto' or 'xla'")
        share = len(seeds) // num_devices
        same = {"env_type": "gymnasium", "num_envs": share, "render_mode": "rgb_array"} | options
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about the precision of bounds
            self.pools = [envpool.make(env_id, seed=seeds[i : i + share], **same) for i in range(0, len(seeds), share)]
            _ = [pool.observation_space for pool in self.pools]  # cached on first use, without the warnings
            self.pool = self.pools[0]
        self.num_envs, self.reward_range, self.midway = len(seeds), reward_range, midway
        # from the array specs, because a Gymnasium space would warn about its bounds
        self.num_actions = int(self.pool.spec.action_array_spec["action"].maximum) + 1
        obs = self.pool.spec.state_array_spec["obs"]
        self.obs_spec = self.frame_spec = jax.ShapeDtypeStruct(tuple(obs.shape), obs.dtype)  # frame_spec: envpool's output
        # the info fields that `receive` uses; only Atari has them
        told = {"reward": np.float32, "terminated": np.int32, "lives": np.int32}
        told = told if "info:terminated" in self.pool.spec.state_array_spec else {}
        self._info = {name: jax.ShapeDtypeStruct((), dtype) for name, dtype in told.items()}
        self.handle, self._receive, self._send = np.zeros(8, np.uint8), self._callback_receive, self._callback_send
        if stepping != "callback":
            try:
                handles, receive, send, _ = zip(*(pool.xla() for pool in self.pools), strict=True)
                self.handle, self._receive, self._send = np.concatenate(handles), one_per_device(receive), one_per_device(send)
            except RuntimeError as error:  # macOS, Windows
                if stepping == "xla" or num_devices > 1:
                    raise
                say_once(f"{error} Falling back to Python callbacks (--env-step callback).")

    def reset(self) -> tuple[PoolState, Array]:
        """Reset every environment. Return the state to thread through `step`, and the first observations."""
        obs = np.concatenate([pool.reset()[0] for pool in self.pools])
        episode = EpisodeStats.zeros(self.num_envs, self.midway)
        over, begins, lives = (jnp.full(self.num_envs, x) for x in (False, True, 0))  # separate arrays, so all can be donated
        return PoolState(jnp.asarray(self.handle), over, begins, lives.astype(jnp.int32), episode), jnp.asarray(obs)

    def _callback_send(self, handle: UInt8[Array, " H"], action: Int[Array, " B"]) -> UInt8[Array, " H"]:
        """Send the actions like envpool's XLA operation, and return the handle."""
        io_callback(lambda action: self.pool.send(np.asarray(action)), None, action, ordered=True)
        return handle

    def _callback_receive(self, handle: UInt8[Array, " H"]) -> tuple[Array, tuple]:
        """Return what envpool's XLA operation does: the handle, and Gymnasium's (obs, reward, terminated, truncated, info)."""

        def receive():
            *returned, info = self.pool.recv()
            return (*returned, {name: info[name] for name in self._info})

        batch = lambda spec: jax.ShapeDtypeStruct((self.num_envs, *spec.shape), spec.dtype)  # noqa: E731
        number, flag = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((), bool)
        returned = jax.tree.map(batch, (self.frame_spec, number, flag, flag, self._info))
        return handle, io_callback(receive, returned, ordered=True)

    def step(self, state: Any, action: Int[Array, " B"]) -> tuple[Any, Timestep]:
        """Step every environment; see `envs.protocol.Timestep`."""
        return self.receive(self.send(state, action))

    def send(self, state: PoolState, action: Int[Array, " B"]) -> PoolState:
        """Start a step in the emulators, without waiting for it."""
        return state._replace(handle=self._send(state.handle, action.astype(jnp.int32)))

    def receive(self, state: PoolState) -> tuple[PoolState, Timestep]:
        """Wait for the step that `send` started, and return its result."""
        handle, (obs, reward, terminated, truncated, info) = self._receive(state.handle)
        terminated, truncated = terminated.astype(bool), truncated.astype(bool)
        valid = ~state.over
        # only Atari reports unclipped rewards, and whether the game ended or only a life was lost
        unclipped = info.get("reward", reward)
        finished = info["terminated"].astype(bool) | truncated if "terminated" in info else terminated | truncated
        # after a lost life envpool plays no-ops; the game may end during them, unreported, and the next game begins
        lives = info.get("lives", state.lives)
        begins = state.over & (state.episode.finished | (lives > state.lives))
        episode = state.episode.update(unclipped, valid, finished | (begins & ~state.episode.finished))
        timestep = Timestep(obs, reward, terminated, truncated, valid, episode)
        return PoolState(handle, terminated | truncated, begins, lives, episode), timestep

    def render(self, state: Any) -> UInt8[np.ndarray, "H W 3"]:
        """Return the emulator's own image of the first environment (210 x 160 for Atari).

        Raises:
            RuntimeError: the environment cannot draw images (Catch-v0).
        """
        return self.pool.render(env_ids=[0])[0]

    def exact_metrics(self, policy: Callable) -> dict[str, Array]:
        """Return no metrics: an emulator's dynamics are not known."""
        return {}


def one_per_device(calls: Sequence[Callable]) -> Callable:
    """Return a function that runs `calls[i]` on device i, with that device's part of the arguments, and joins the results."""
    if len(calls) == 1:
        return calls[0]
    own = lambda *x: jax.lax.switch(jax.lax.axis_index(DEVICES), calls, *x)  # noqa: E731
    return jax.shard_map(own, in_specs=P(DEVICES), out_specs=P(DEVICES), check_vma=False)


class FrameState(NamedTuple):
    """A pool's state, each game's stack of frames, and `age`: the number of earlier frames in the stack from the same game."""

    pool: PoolState
    stack: UInt8[Array, "B S H W"]
    age: Int8[Array, " B"]


def in_order(state: PoolState | FrameState, earlier: PoolState | FrameState) -> PoolState | FrameState:
    """Give `state` the handle of `earlier`, so that its next call runs after that pool's last one. (A handle only orders calls:
    which pool is called is compiled into the program.)"""
    if isinstance(state, FrameState):
        return state._replace(pool=in_order(state.pool, earlier.pool))
    return state._replace(handle=earlier.handle)


class FramePool(Pool):
    """A pool of games whose single frames are stacked on the device. The observations equal envpool's own stacks, for a
    quarter of the copied bytes. A game's first stack repeats its first frame; a lost life does not start a new game.

    Args: see `Pool`.
    """

    stacks_frames = True

    def __init__(self, *args, **options):
        super().__init__(*args, stack_num=1, **options)
        self.obs_spec = jax.ShapeDtypeStruct((STACK, *self.frame_spec.shape[1:]), self.frame_spec.dtype)

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


def make_pool(
    env_id: str,
    num_envs: int,
    seed: int,
    reward_clip: bool = True,
    protocol: AtariProtocol = PLAIN,
    stepping: Literal["auto", "xla", "callback"] = "auto",
    iteration: int = 0,
    full_action_space: bool = False,
    num_devices: int = 1,
    part: slice = slice(None),
) -> Pool:
    """Create a pool of environments.

    Args:
        env_id: one of `atari_ids()` or `CLASSIC`.
        num_envs: number of environments that step together.
        seed: seed of the whole pool; see `env_seeds`.
        reward_clip: train on the sign of Atari's rewards.
        protocol: sticky actions and no-ops (Atari only).
        stepping: see `Pool`.
        iteration: the run's iteration when these environments start; see `env_seeds` and `EpisodeStats.to_count`.
        full_action_space: use all 18 Atari actions, not only those with an effect in the game.
        num_devices: see `Pool`.
        part: the slice of the environments to create.

    Raises:
        ValueError: the id is unknown, or see `Pool`.
        RuntimeError: see `Pool`.
    """
    start = env_id, env_seeds(seed, num_envs, iteration)[part]
    how = stepping, iteration > 0, num_devices
    if env_id in CLASSIC:
        return Pool(*start, CLASSIC[env_id], *how)
    if env_id not in atari_ids():
        raise ValueError(f"env_id {env_id!r}: unknown environment; see envs/registry.py for the valid ids")
    reward_range = (-1.0, 1.0) if reward_clip else (-np.inf, np.inf)
    options = protocol._asdict() | {"episodic_life": True, "reward_clip": reward_clip, "full_action_space": full_action_space}
    return FramePool(*start, reward_range, *how, **options)


def make_machado_pool(env_id: str, num_envs: int, seed: int, stepping: Literal["auto", "xla", "callback"] = "auto") -> Pool:
    """Create a pool of Atari games with the evaluation protocol of Machado et al. (2018, arXiv 1709.06009): sticky actions with
    probability 0.25, all 18 actions, and no knowledge of lives. Losing one does not end an episode, and fire is not pressed
    afterwards. (Their episodes end after 5 minutes and skip 5 frames; as is usual today, ours end after 30 and skip 4.)

    Args:
        env_id, num_envs, seed, stepping: see `make_pool`.
    """
    options = {"repeat_action_probability": 0.25, "full_action_space": True, "episodic_life": False, "reward_clip": False}
    options |= {"noop_max": 1, "use_fire_reset": False}
    return FramePool(env_id, env_seeds(seed, num_envs), (-np.inf, np.inf), stepping, **options)
