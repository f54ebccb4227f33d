"""envpool's environments with pure, jittable steps. A specification says what an environment observes, and how it acts."""

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
from jaxtyping import Array, Bool, Int, UInt8

from envs.observations import Part, Unreadable, pack, packed_dtype, part_of
from envs.options import EnvError, read_options
from envs.protocol import DEVICES, Env, EpisodeStats, Timestep

MODULES = {"classic_control": "classic", "toy_text": "classic"}  # envpool's modules with another name as a family here
SYMBOLS = {("minigrid", "image"): (11, 6, 3)}  # objects, colors and states of MiniGrid, whose specification only says bytes
TEXTS = {("minigrid", "mission")}
# the range of one step's reward, of an id or of a family, from the rules or the source; all others are taken as unbounded
REWARDS = {
    "Acrobot-v1": (-1.0, 0.0), "CartPole-v0": (0.0, 1.0), "CartPole-v1": (0.0, 1.0), "MountainCar-v0": (-1.0, 0.0),
    "Catch-v0": (-1.0, 1.0), "FrozenLake-v1": (0.0, 1.0), "FrozenLake8x8-v1": (0.0, 1.0), "NChain-v0": (0.0, 10.0),
    "Taxi-v3": (-10.0, 20.0), "Taxi-v4": (-10.0, 20.0), "Blackjack-v1": (-1.0, 1.5), "tabular/Blackjack-v0": (-1.0, 1.5),
    "CliffWalking-v0": (-100.0, 0.0), "CliffWalking-v1": (-100.0, 0.0), "CliffWalkingSlippery-v1": (-100.0, 0.0),
    "tabular/CliffWalking-v0": (-100.0, 0.0),
    "phys2d/CartPole-v0": (0.0, 1.0), "phys2d/CartPole-v1": (0.0, 1.0), "minigrid": (-1.0, 1.0),
}  # fmt: skip
# options that scripts set, or that would change what a pool relies on
OURS = ("num_envs", "batch_size", "num_threads", "max_num_players", "thread_affinity_offset", "base_path", "seed", "env_seed")
OURS += ("gym_reset_return_info", "env_name", "task", "stack_num", "img_height", "img_width", "gray_scale", "channel_first")
OURS += ("repeat_action_probability", "noop_max", "full_action_space", "reward_clip", "episodic_life", "auto_reset")
OURS += ("zero_discount_on_life_loss", "reward_threshold")  # without effect: no script reads envpool's discount
OURS += ("initial_state", "debug_state", "controlled_vehicles", "mission_bytes", "fractal_noise_angles", "map_size")


def pool_ids() -> tuple[str, ...]:
    """Return all ids of envpool, also those whose observations or actions no script here supports."""
    return tuple(sorted(_registry().specs))


def module_of(env_id: str) -> str | None:
    """Return the module of envpool that has an environment, such as `procgen`; None if none has."""
    spec = _registry().specs.get(env_id)
    return spec and spec[0].removeprefix("envpool.")


def _registry() -> Any:
    import envpool  # importing envpool takes seconds, so it happens only where needed, here and below

    return envpool.registration.registry


def pool_options(env_id: str, typed: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of --env-option, with the types of the environment's own.

    Raises:
        EnvError: there is no such option, or its value has another type.
    """
    if not typed:
        return {}
    config = _make_spec(env_id).config._asdict()
    return read_options(typed, {name: value for name, value in config.items() if name not in OURS}, env_id)


class PoolSpec(NamedTuple):
    """What an environment's specification says."""

    num_actions: int
    obs_spec: jax.ShapeDtypeStruct  # of the pool's observations, packed if there are parts
    obs_parts: tuple[Part, ...] | None
    resets_within: bool  # the step that ends an episode returns the first observation of the next one


class Unsupported(EnvError):
    """Scripts cannot train on this environment. The message says why."""


@functools.cache
def pool_spec(env_id: str, typed: tuple[str, ...] = ()) -> PoolSpec:
    """Read the specification of an environment with these options (`pool_options`).

    Raises:
        EnvError: scripts cannot train on it. The message says why.
    """
    try:
        return _pool_spec(module_of(env_id), _make_spec(env_id, **pool_options(env_id, typed)))
    except Unsupported as error:
        options = f" --env-option {' '.join(typed)}" if typed else ""
        raise EnvError(f"--env-id {env_id}{options}: {error}") from None


def _pool_spec(module: str | None, spec: Any) -> PoolSpec:
    action = spec.action_array_spec.get("action")
    if action is None:
        raise Unsupported("has several agents, but scripts train one")
    if not np.issubdtype(action.dtype, np.integer):
        raise Unsupported("has continuous actions, but scripts need one discrete action")
    if tuple(action.shape) not in ((), (-1,)):
        raise Unsupported("takes several actions in each step, but scripts need one discrete action")
    arrays = _observed(spec)
    if any(len(x.shape) > 1 and x.shape[0] == -1 for x in arrays.values()):
        raise Unsupported("has several players, but scripts train one agent")
    parts = []
    for short, x in arrays.items():
        shape = [n for n in x.shape if n != -1]
        if (module, short) in TEXTS:
            parts.append(Part(short, tuple(shape), "text"))
            continue
        try:
            parts.append(part_of(short, shape, x.dtype, x.minimum, x.maximum, SYMBOLS.get((module, short))))
        except Unreadable as error:
            raise Unsupported(f"has an observation that no encoder reads: {error}") from None
    obs = arrays.get("obs")
    if obs is not None and parts[0].kind in ("pixels", "numbers"):
        parts, obs_spec = None, jax.ShapeDtypeStruct(tuple(obs.shape), obs.dtype)
    else:
        size = sum(int(np.prod(part.shape)) for part in parts)
        parts, obs_spec = tuple(parts), jax.ShapeDtypeStruct((size,), packed_dtype(parts))
    resets_within = bool(getattr(spec.config, "auto_reset", False))
    return PoolSpec(int(action.maximum) + 1, obs_spec, parts, resets_within)


def _observed(spec: Any) -> dict[str, Any]:
    """Return the specification of each array of an observation, by name; the only one is called "obs"."""
    arrays = spec.state_array_spec.items()
    return {name.removeprefix("obs:"): x for name, x in arrays if name == "obs" or name.startswith("obs:")}


def _make_spec(env_id: str, **options: Any) -> Any:
    import envpool

    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about the precision of bounds
            return envpool.make_spec(env_id, **options)
    except (RuntimeError, ValueError, TypeError, ImportError) as error:  # a file or package is missing, or an option is wrong
        raise Unsupported(f"envpool cannot make it: {' '.join(str(error).split())}") from None


def pool_rewards(env_id: str) -> tuple[float, float]:
    """Return the range of one step's reward (`REWARDS`); infinite if it is not known."""
    return REWARDS.get(env_id) or REWARDS.get(module_of(env_id) or "", (-np.inf, np.inf))


@functools.cache
def can_be_drawn(env_id: str) -> bool:
    """Return True if the environment draws images of itself."""
    pool = Pool(env_id, [0], (-np.inf, np.inf)).pool  # without JAX, which may not have been started
    pool.reset()
    try:
        pool.render(env_ids=[0])
    except RuntimeError:
        return False
    return True


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


class Pool(Env):
    """An envpool pool that implements `envs.protocol.Env`.

    A pool belongs to one program: its address is compiled into the function that jits `step`. The emulators' state lives in the
    pool, so it cannot be copied or saved.

    Args:
        env_id: an id for which `pool_spec` raises no error.
        seeds: one per environment.
        reward_range: range of the rewards that the pool returns.
        stepping: `xla` steps the pool inside the compiled program, with envpool's XLA operation (Linux only); `callback` calls
            Python at every step, in order; `auto` uses `xla` if it is available. Both return the same values.
        midway: the environments belong to a resumed run; see `EpisodeStats.to_count`.
        num_devices: number of devices. Each one steps an equal part of the environments, in its own pool (see `utils.devices`).
        typed: options of --env-option; see `pool_options`.
        options: passed to envpool.

    Raises:
        EnvError: envpool cannot create the environment with these options.
        RuntimeError: `xla` or several devices are requested, but envpool has no XLA operation on this system.
        ValueError: several devices are requested with `callback`.
    """

    saveable = False

    def __init__(
        self,
        env_id: str,
        seeds: list[int],
        reward_range: tuple[float, float],
        stepping: Literal["auto", "xla", "callback"] = "auto",
        midway: bool = False,
        num_devices: int = 1,
        typed: tuple[str, ...] = (),
        **options,
    ):
        import envpool

        if stepping == "callback" and num_devices > 1:
            raise ValueError("stepping='callback': supports one device only; use 'auto' or 'xla'")
        share = len(seeds) // num_devices
        same = {"env_type": "gymnasium", "num_envs": share, "render_mode": "rgb_array"} | options | pool_options(env_id, typed)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about the precision of bounds
            try:
                self.pools = [envpool.make(env_id, seed=seeds[i : i + share], **same) for i in range(0, len(seeds), share)]
            except (RuntimeError, ValueError) as error:  # an option has a wrong value
                raise EnvError(f"--env-id {env_id} {' '.join(typed)}: envpool cannot create it ({error})") from None
            _ = [pool.observation_space for pool in self.pools]  # cached on first use, without the warnings
            self.pool = self.pools[0]
        self.num_envs, self.reward_range, self.midway = len(seeds), reward_range, midway
        # from the array specs, because a Gymnasium space would warn about its bounds
        self.num_actions = int(self.pool.spec.action_array_spec["action"].maximum) + 1
        _, self.obs_spec, self.obs_parts, self.resets_within = pool_spec(env_id, typed)
        self._arrays = nested(_observed(self.pool.spec))
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
        obs = jax.tree.map(lambda *x: np.concatenate(x), *(pool.reset()[0] for pool in self.pools))
        episode = EpisodeStats.zeros(self.num_envs, self.midway)
        over, begins, lives = (jnp.full(self.num_envs, x) for x in (False, True, 0))  # separate arrays, so all can be donated
        return PoolState(jnp.asarray(self.handle), over, begins, lives.astype(jnp.int32), episode), self._pack(obs)

    def _pack(self, obs: Any) -> Array:
        """Return the pool's observations as one array."""
        return jnp.asarray(obs) if self.obs_parts is None else pack(flat(jax.tree.map(jnp.asarray, obs)), self.obs_parts)

    def _callback_send(self, handle: UInt8[Array, " H"], action: Int[Array, " B"]) -> UInt8[Array, " H"]:
        """Send the actions like envpool's XLA operation, and return the handle."""
        io_callback(lambda action: self.pool.send(np.asarray(action)), None, action, ordered=True)
        return handle

    def _callback_receive(self, handle: UInt8[Array, " H"]) -> tuple[Array, tuple]:
        """Return what envpool's XLA operation does: the handle, and Gymnasium's (obs, reward, terminated, truncated, info)."""

        def receive():
            *returned, info = self.pool.recv()
            return (*returned, {name: info[name] for name in self._info})

        batch = lambda x: jax.ShapeDtypeStruct((self.num_envs, *(n for n in x.shape if n != -1)), x.dtype)  # noqa: E731
        number, flag = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((), bool)
        returned = jax.tree.map(batch, (self._arrays, number, flag, flag, self._info))
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
        terminated = terminated.astype(bool)
        truncated = truncated.astype(bool) & ~terminated  # some environments return both
        played = ~state.over
        # only Atari reports unclipped rewards, and whether the game ended or only a life was lost
        unclipped = info.get("reward", reward)
        finished = info["terminated"].astype(bool) | truncated if "terminated" in info else terminated | truncated
        # after a lost life envpool plays no-ops; the game may end during them, unreported, and the next game begins
        lives = info.get("lives", state.lives)
        begins = state.over & (state.episode.finished | (lives > state.lives))
        episode = state.episode.update(unclipped, played, finished | (begins & ~state.episode.finished))
        done = terminated | truncated
        unseen_end = done & self.resets_within
        valid = played & ~(truncated & unseen_end)
        timestep = Timestep(self._pack(obs), reward, terminated, truncated, valid, episode, unseen_end)
        return PoolState(handle, done & ~unseen_end, begins, lives, episode), timestep

    def render(self, state: Any) -> UInt8[np.ndarray, "H W 3"]:
        """Return the emulator's own image of the first environment (210 x 160 for Atari).

        Raises:
            RuntimeError: the environment cannot draw images (`can_be_drawn`).
        """
        return self.pool.render(env_ids=[0])[0]


def nested(arrays: dict[str, Any]) -> Any:
    """Return arrays as envpool does: in dictionaries within dictionaries, by the dots in their names; one array as it is."""
    if list(arrays) == ["obs"]:
        return arrays["obs"]
    tree = {}
    for name, x in arrays.items():
        *path, last = name.split(".")
        within = tree
        for step in path:
            within = within.setdefault(step, {})
        within[last] = x
    return tree


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the arrays of envpool's dictionaries by name; the inverse of `nested`."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix(".") or "obs": tree}
    return {name: x for key, inner in tree.items() for name, x in flat(inner, f"{prefix}{key}.").items()}


def one_per_device(calls: Sequence[Callable]) -> Callable:
    """Return a function that runs `calls[i]` on device i, with that device's part of the arguments, and joins the results."""
    if len(calls) == 1:
        return calls[0]
    own = lambda *x: jax.lax.switch(jax.lax.axis_index(DEVICES), calls, *x)  # noqa: E731
    return jax.shard_map(own, in_specs=P(DEVICES), out_specs=P(DEVICES), check_vma=False)


def in_order(state: Any, earlier: Any) -> Any:
    """Give `state` the handle of `earlier`, so that its next call runs after that pool's last one. (A handle only orders calls:
    which pool is called is compiled into the program.) A state may contain a `PoolState` as its field `pool`."""
    if isinstance(state, PoolState):
        return state._replace(handle=earlier.handle)
    return state._replace(pool=in_order(state.pool, earlier.pool))
