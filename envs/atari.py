"""envpool's environments (Atari, and the small classic ones that tests use) as pure, jittable steps."""

import functools
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Int, UInt8

from envs.protocol import EpisodeStats, Timestep

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


class PoolState(NamedTuple):
    """`handle` orders the calls to the pool: whoever drops or reuses an old one gets wrong results, not an error. (Calls
    through Python order themselves; there it stands for nothing.)"""

    handle: UInt8[Array, " 8"]
    over: Bool[Array, " B"]  # the last observation ended an episode (for the agent: a lost life counts)
    episode: EpisodeStats


class Pool:
    """An envpool pool behind the protocol of `envs.protocol.Env`.

    One pool serves one program: its address is compiled into whatever jits `step`. The emulators' state lives in the pool,
    so it can be neither copied nor saved.

    Args:
        env_id, num_envs, seed, iteration: as for `make_pool`.
        reward_range: of the rewards that it returns.
        stepping: `xla` steps the pool within the compiled program, by envpool's own operation, which it offers on Linux alone;
            `callback` leaves the program for Python at every step, in order; `auto` takes the first where there is one. Both
            return the same.
        options: of envpool's.

    Raises:
        RuntimeError: `xla` is asked for, and envpool has none on this system.
    """

    saveable = False

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int,
        reward_range: tuple[float, float],
        stepping: Literal["auto", "xla", "callback"] = "auto",
        iteration: int = 0,
        **options,
    ):
        import envpool

        with warnings.catch_warnings(action="ignore", category=UserWarning):  # on the precision of bounds
            seeds = env_seeds(seed, num_envs, iteration)
            kept = {"env_type": "gymnasium", "num_envs": num_envs, "seed": seeds, "render_mode": "rgb_array"}
            self.pool = envpool.make(env_id, **kept, **options)
            _ = self.pool.observation_space  # made on first use, and kept
        self.num_envs, self.reward_range, self.midway = num_envs, reward_range, iteration > 0
        # of the arrays, for a Gymnasium space would warn of its bounds
        self.num_actions = int(self.pool.spec.action_array_spec["action"].maximum) + 1
        obs = self.pool.spec.state_array_spec["obs"]
        self.obs_spec = jax.ShapeDtypeStruct(tuple(obs.shape), obs.dtype)
        # what `step` reads of what only Atari tells
        told = {"reward": np.float32, "terminated": np.int32} if "info:terminated" in self.pool.spec.state_array_spec else {}
        self._info = {name: jax.ShapeDtypeStruct((), dtype) for name, dtype in told.items()}
        self.handle, self._step = np.zeros(8, np.uint8), self._callback_step
        if stepping != "callback":
            try:
                self.handle, _, _, self._step = self.pool.xla()
            except RuntimeError as error:  # macOS, Windows
                if stepping == "xla":
                    raise
                print(f"{error} Python steps the environments instead.")

    def reset(self) -> tuple[PoolState, Array]:
        """Starts every environment anew and returns the state to thread through `step` and the first observations."""
        obs, _ = self.pool.reset()
        episode = EpisodeStats.zeros(self.num_envs, self.midway)
        return PoolState(jnp.asarray(self.handle), jnp.zeros(self.num_envs, bool), episode), jnp.asarray(obs)

    def _callback_step(self, handle: UInt8[Array, " 8"], action: Int[Array, " B"]) -> tuple[Array, tuple]:
        """What envpool's own operation returns: the handle, and the observation, reward, flags and info of Gymnasium."""

        def step(action):
            *returned, info = self.pool.step(np.asarray(action))
            return (*returned, {name: info[name] for name in self._info})

        batch = lambda spec: jax.ShapeDtypeStruct((self.num_envs, *spec.shape), spec.dtype)  # noqa: E731
        number, flag = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((), bool)
        returned = jax.tree.map(batch, (self.obs_spec, number, flag, flag, self._info))
        return handle, io_callback(step, returned, action, ordered=True)

    def step(self, state: PoolState, action: Int[Array, " B"]) -> tuple[PoolState, Timestep]:
        """One step of every environment; see `envs.protocol.Timestep`."""
        handle, (obs, reward, terminated, truncated, info) = self._step(state.handle, action.astype(jnp.int32))
        terminated, truncated = terminated.astype(bool), truncated.astype(bool)
        valid = ~state.over
        # only Atari reports rewards before clipping, and whether an end is a lost life or the end of the game
        unclipped = info.get("reward", reward)
        finished = info["terminated"].astype(bool) | truncated if "terminated" in info else terminated | truncated
        episode = state.episode.update(unclipped, valid, finished)
        timestep = Timestep(obs, reward, terminated, truncated, valid, episode)
        return PoolState(handle, terminated | truncated, episode), timestep

    def render(self, state: PoolState) -> UInt8[np.ndarray, "H W 3"]:
        """The emulator's own picture of the first environment, of Atari 210 x 160.

        Raises:
            RuntimeError: it draws none (Catch-v0).
        """
        return self.pool.render(env_ids=[0])[0]

    def exact_metrics(self, policy: Callable) -> dict[str, Array]:
        """Nothing: an emulator's dynamics are not known."""
        return {}


def make_pool(
    env_id: str,
    num_envs: int,
    seed: int,
    reward_clip: bool = True,
    stochastic: bool = False,
    stepping: Literal["auto", "xla", "callback"] = "auto",
    iteration: int = 0,
    full_action_space: bool = False,
) -> Pool:
    """A pool of environments.

    Args:
        env_id: one of `atari_ids()` or `CLASSIC`.
        num_envs: how many step together.
        seed: of the whole pool, see `env_seeds`.
        reward_clip: train on the sign of Atari's rewards.
        stochastic: Atari's stochastic protocol: the last action is repeated with probability 0.3, and up to 60 no-ops
            start a game (instead of 0 and 30).
        stepping: see `Pool`.
        iteration: of the run when these environments start: see `env_seeds`, and `EpisodeStats.to_count`.
        full_action_space: all 18 actions of Atari, not only those that do something in the game.

    Raises:
        ValueError: the id is not known.
        RuntimeError: as `Pool`.
    """
    if env_id in CLASSIC:
        return Pool(env_id, num_envs, seed, CLASSIC[env_id], stepping, iteration)
    if env_id not in atari_ids():
        raise ValueError(f"unknown environment {env_id!r}")
    protocol = {"repeat_action_probability": 0.3, "noop_max": 60} if stochastic else {}
    reward_range = (-1.0, 1.0) if reward_clip else (-np.inf, np.inf)
    options = protocol | {"episodic_life": True, "reward_clip": reward_clip, "full_action_space": full_action_space}
    return Pool(env_id, num_envs, seed, reward_range, stepping, iteration, **options)


def make_machado_pool(env_id: str, num_envs: int, seed: int, stepping: Literal["auto", "xla", "callback"] = "auto") -> Pool:
    """A pool of Atari games as Machado et al. (2018, arXiv 1709.06009) evaluate: actions are repeated with probability 0.25,
    all 18 of them can be chosen, and lives are not known of: neither does losing one end an episode, nor is fire pressed for
    the agent after it. (Theirs end after 5 minutes and skip 5 frames; as is usual since, ours end after 30 and skip 4.)

    Args:
        env_id, num_envs, seed, stepping: as for `make_pool`.
    """
    options = {"repeat_action_probability": 0.25, "full_action_space": True, "episodic_life": False, "reward_clip": False}
    options |= {"noop_max": 1, "use_fire_reset": False}
    return Pool(env_id, num_envs, seed, (-np.inf, np.inf), stepping, **options)
