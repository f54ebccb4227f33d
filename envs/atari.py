"""envpool's environments (Atari, and the small classic ones that tests use) as pure, jittable steps."""

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
    """What makes an Atari game random: the probability with which each frame repeats the action of the frame before it ("sticky
    actions"), and the largest number of no-ops that start a game (drawn uniformly from 1 to this)."""

    repeat_action_probability: float
    noop_max: int


PLAIN, STOCHASTIC = AtariProtocol(0.0, 30), AtariProtocol(0.3, 60)  # envpool's default, and the paper's stochastic protocol
CLASSIC = {"Acrobot-v1": (-1.0, 0.0), "CartPole-v1": (0.0, 1.0), "Catch-v0": (-1.0, 1.0)}  # and the range of their rewards


@functools.cache
def atari_ids() -> tuple[str, ...]:
    """The ids of envpool's Atari games with pixels."""
    import envpool  # here and below, because that takes seconds, which other environments need not wait for

    return tuple(sorted(env_id for env_id, spec in envpool.registration.registry.specs.items() if spec[0] == "envpool.atari"))


def env_seeds(seed: int, num_envs: int, iteration: int = 0) -> list[int]:
    """A seed for each environment, such that runs with different seeds share none; nor does a run that goes on from that
    iteration, with itself.

    envpool would otherwise seed environment i with seed + i, and the runs with seeds s and s + 1 would share all
    environments but one.
    """
    entropy = [seed, iteration] if iteration else seed
    seeds = np.random.SeedSequence(entropy).generate_state(num_envs) >> 1  # envpool takes 31 bits
    return [int(s) for s in seeds]


say_once = functools.cache(partial(print, flush=True))


class PoolState(NamedTuple):
    """`handle` orders the calls to the pool: whoever drops or reuses an old one gets wrong results, not an error. (Calls
    through Python order themselves; there it stands for nothing.)"""

    handle: UInt8[Array, " H"]  # 8 bytes on each device
    over: Bool[Array, " B"]  # the last observation ended an episode (for the agent: a lost life counts)
    begins: Bool[Array, " B"]  # it is the first of a game
    lives: Int[Array, " B"]  # left, in games that have any
    episode: EpisodeStats


class Pool:
    """An envpool pool behind the protocol of `envs.protocol.Env`.

    One pool serves one program: its address is compiled into whatever jits `step`. The emulators' state lives in the pool,
    so it can be neither copied nor saved.

    Args:
        env_id: as for `make_pool`.
        seeds: of each environment.
        reward_range: of the rewards that it returns.
        stepping: `xla` steps the pool within the compiled program, by envpool's own operation, which it offers on Linux alone;
            `callback` leaves the program for Python at every step, in order; `auto` takes the first where there is one. Both
            return the same.
        midway: a run goes on with them: see `EpisodeStats.to_count`.
        num_devices: each steps an equal share of the environments (`utils.devices`), emulated by a pool of its own.
        options: of envpool's.

    Raises:
        RuntimeError: `xla` is asked for, or several devices, and envpool has no such operation on this system.
        ValueError: several devices, and `callback`.
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
            raise ValueError("only envpool's own operation steps pools of several devices, not a callback")
        share = len(seeds) // num_devices
        same = {"env_type": "gymnasium", "num_envs": share, "render_mode": "rgb_array"} | options
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # on the precision of bounds
            self.pools = [envpool.make(env_id, seed=seeds[i : i + share], **same) for i in range(0, len(seeds), share)]
            _ = [pool.observation_space for pool in self.pools]  # made on first use, and kept
            self.pool = self.pools[0]
        self.num_envs, self.reward_range, self.midway = len(seeds), reward_range, midway
        # of the arrays, for a Gymnasium space would warn of its bounds
        self.num_actions = int(self.pool.spec.action_array_spec["action"].maximum) + 1
        obs = self.pool.spec.state_array_spec["obs"]
        self.obs_spec = self.frame_spec = jax.ShapeDtypeStruct(tuple(obs.shape), obs.dtype)  # the latter: what envpool returns
        # what `step` reads of what only Atari tells
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
                say_once(f"{error} Python steps the environments instead.")

    def reset(self) -> tuple[PoolState, Array]:
        """Starts every environment anew and returns the state to thread through `step` and the first observations."""
        obs = np.concatenate([pool.reset()[0] for pool in self.pools])
        episode = EpisodeStats.zeros(self.num_envs, self.midway)
        over, begins, lives = (jnp.full(self.num_envs, x) for x in (False, True, 0))  # an array each, or none could be donated
        return PoolState(jnp.asarray(self.handle), over, begins, lives.astype(jnp.int32), episode), jnp.asarray(obs)

    def _callback_send(self, handle: UInt8[Array, " H"], action: Int[Array, " B"]) -> UInt8[Array, " H"]:
        """What envpool's own operation does, and returns: the handle."""
        io_callback(lambda action: self.pool.send(np.asarray(action)), None, action, ordered=True)
        return handle

    def _callback_receive(self, handle: UInt8[Array, " H"]) -> tuple[Array, tuple]:
        """What envpool's own operation returns: the handle, and the observation, reward, flags and info of Gymnasium."""

        def receive():
            *returned, info = self.pool.recv()
            return (*returned, {name: info[name] for name in self._info})

        batch = lambda spec: jax.ShapeDtypeStruct((self.num_envs, *spec.shape), spec.dtype)  # noqa: E731
        number, flag = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((), bool)
        returned = jax.tree.map(batch, (self.frame_spec, number, flag, flag, self._info))
        return handle, io_callback(receive, returned, ordered=True)

    def step(self, state: Any, action: Int[Array, " B"]) -> tuple[Any, Timestep]:
        """One step of every environment; see `envs.protocol.Timestep`."""
        return self.receive(self.send(state, action))

    def send(self, state: PoolState, action: Int[Array, " B"]) -> PoolState:
        """Has the emulators begin a step, and does not wait for them."""
        return state._replace(handle=self._send(state.handle, action.astype(jnp.int32)))

    def receive(self, state: PoolState) -> tuple[PoolState, Timestep]:
        """The end of a step that was begun."""
        handle, (obs, reward, terminated, truncated, info) = self._receive(state.handle)
        terminated, truncated = terminated.astype(bool), truncated.astype(bool)
        valid = ~state.over
        # only Atari reports rewards before clipping, and whether an end is a lost life or the end of the game
        unclipped = info.get("reward", reward)
        finished = info["terminated"].astype(bool) | truncated if "terminated" in info else terminated | truncated
        # after a lost life envpool does nothing for a while; a game may end in that, unannounced, and the next one begins
        lives = info.get("lives", state.lives)
        begins = state.over & (state.episode.finished | (lives > state.lives))
        episode = state.episode.update(unclipped, valid, finished | (begins & ~state.episode.finished))
        timestep = Timestep(obs, reward, terminated, truncated, valid, episode)
        return PoolState(handle, terminated | truncated, begins, lives, episode), timestep

    def render(self, state: Any) -> UInt8[np.ndarray, "H W 3"]:
        """The emulator's own picture of the first environment, of Atari 210 x 160.

        Raises:
            RuntimeError: it draws none (Catch-v0).
        """
        return self.pool.render(env_ids=[0])[0]

    def exact_metrics(self, policy: Callable) -> dict[str, Array]:
        """Nothing: an emulator's dynamics are not known."""
        return {}


def one_per_device(calls: Sequence[Callable]) -> Callable:
    """A call for each device: each makes its own, with its share of the arguments, and the results are put together."""
    if len(calls) == 1:
        return calls[0]
    own = lambda *x: jax.lax.switch(jax.lax.axis_index(DEVICES), calls, *x)  # noqa: E731
    return jax.shard_map(own, in_specs=P(DEVICES), out_specs=P(DEVICES), check_vma=False)


class FrameState(NamedTuple):
    """The pool's state, and what the agents see: the last frames, and how many of the game stand before the newest of them."""

    pool: PoolState
    stack: UInt8[Array, "B S H W"]
    age: Int8[Array, " B"]


def in_order(state: PoolState | FrameState, earlier: PoolState | FrameState) -> PoolState | FrameState:
    """A pool's state whose next call comes after the last one of another, alike. (A handle orders calls, and no more: which
    pool is called is compiled into the program.)"""
    if isinstance(state, FrameState):
        return state._replace(pool=in_order(state.pool, earlier.pool))
    return state._replace(handle=earlier.handle)


class FramePool(Pool):
    """A pool of games of which envpool returns single frames, stacked on the device: the same observations as envpool's own
    stacks, in a quarter of the traffic. Before the first frame of a game stands that frame again; a lost life is no new game.

    Args: as for `Pool`.
    """

    stacks_frames = True

    def __init__(self, *args, **options):
        super().__init__(*args, stack_num=1, **options)
        self.obs_spec = jax.ShapeDtypeStruct((STACK, *self.frame_spec.shape[1:]), self.frame_spec.dtype)

    def reset(self) -> tuple[FrameState, UInt8[Array, "B S H W"]]:
        """As `Pool.reset`."""
        state, frame = super().reset()
        stack = jnp.repeat(frame, STACK, axis=1)
        return FrameState(state, stack, jnp.zeros(self.num_envs, jnp.int8)), jnp.array(stack)

    def send(self, state: FrameState, action: Int[Array, " B"]) -> FrameState:
        """As `Pool.send`."""
        return state._replace(pool=super().send(state.pool, action))

    def receive(self, state: FrameState) -> tuple[FrameState, Timestep]:
        """As `Pool.receive`."""
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
    """A pool of environments.

    Args:
        env_id: one of `atari_ids()` or `CLASSIC`.
        num_envs: how many step together.
        seed: of the whole pool, see `env_seeds`.
        reward_clip: train on the sign of Atari's rewards.
        protocol: sticky actions and no-ops, of Atari alone.
        stepping: see `Pool`.
        iteration: of the run when these environments start: see `env_seeds`, and `EpisodeStats.to_count`.
        full_action_space: all 18 actions of Atari, not only those that do something in the game.
        num_devices: see `Pool`.
        part: of the environments, those that are wanted.

    Raises:
        ValueError: the id is not known.
        RuntimeError: as `Pool`.
    """
    start = env_id, env_seeds(seed, num_envs, iteration)[part]
    how = stepping, iteration > 0, num_devices
    if env_id in CLASSIC:
        return Pool(*start, CLASSIC[env_id], *how)
    if env_id not in atari_ids():
        raise ValueError(f"unknown environment {env_id!r}")
    reward_range = (-1.0, 1.0) if reward_clip else (-np.inf, np.inf)
    options = protocol._asdict() | {"episodic_life": True, "reward_clip": reward_clip, "full_action_space": full_action_space}
    return FramePool(*start, reward_range, *how, **options)


def make_machado_pool(env_id: str, num_envs: int, seed: int, stepping: Literal["auto", "xla", "callback"] = "auto") -> Pool:
    """A pool of Atari games as Machado et al. (2018, arXiv 1709.06009) evaluate: actions are repeated with probability 0.25,
    all 18 of them can be chosen, and lives are not known of: neither does losing one end an episode, nor is fire pressed for
    the agent after it. (Theirs end after 5 minutes and skip 5 frames; as is usual since, ours end after 30 and skip 4.)

    Args:
        env_id, num_envs, seed, stepping: as for `make_pool`.
    """
    options = {"repeat_action_probability": 0.25, "full_action_space": True, "episodic_life": False, "reward_clip": False}
    options |= {"noop_max": 1, "use_fire_reset": False}
    return FramePool(env_id, env_seeds(seed, num_envs), (-np.inf, np.inf), stepping, **options)
