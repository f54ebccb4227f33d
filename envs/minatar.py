"""MinAtar: five Atari games on a grid of 10 x 10 cells (Young & Tian, 2019), in JAX, by pgx.

The games come from the library pgx-minatar, an optional extra because of its license (GPL-3): `uv run --extra minatar ...`. An
action is replaced by the previous one with probability 0.1 (sticky actions), and some games get harder over time. The actions
are those with an effect in the game. An observation has one binary map per type of object. This module adds the handling of
episode ends (`envs.protocol.Timestep`) and a time limit that truncates. docs/minatar.md lists differences from the original.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from envs.protocol import EpisodeStats, Timestep, own_seed

CELL_PIXELS = 16
COLORS = np.array([
    (0, 0, 0), (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
], np.uint8)  # fmt: skip
TIME_LIMIT = 10_000  # steps of an episode; only Freeway has a limit in its rules: it ends with step 2,501
PACKAGES = ("pgx", "pgx_minatar")
NEEDED = "needs the packages pgx and pgx-minatar; use uv run --extra minatar ..., or pip install both"


class Game(NamedTuple):
    """The library's name of a game, and the range of its rewards per step."""

    name: str
    reward_range: tuple[float, float]


GAMES = {
    "Asterix-MinAtar": Game("minatar-asterix", (0.0, 1.0)),  # one object per row: at most 1 point
    "Breakout-MinAtar": Game("minatar-breakout", (0.0, 1.0)),
    "Freeway-MinAtar": Game("minatar-freeway", (0.0, 1.0)),
    # 9 for oxygen (-1 if there is none), plus 1 for each of 2 bullets; below: 2 bullets
    "Seaquest-MinAtar": Game("minatar-seaquest", (-1.0, 11.0)),
    "SpaceInvaders-MinAtar": Game("minatar-space_invaders", (0.0, 2.0)),
}


def in_colors(maps: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """Draw an observation [H, W, C] with one color per type of object. Later types cover earlier ones."""
    maps = maps.astype(bool)
    kind = np.where(maps.any(-1), maps.shape[-1] - np.argmax(maps[..., ::-1], -1), 0)  # 1 + the last type; 0 if none
    return COLORS[kind]


def is_installed() -> bool:
    """Return True if the packages of the extra are installed."""
    return all(importlib.util.find_spec(name) for name in PACKAGES)


class MinAtarState(NamedTuple):
    """State of B games."""

    game: Any  # the library's state, each array [B, ...]
    steps: Int[Array, " B"]  # taken in the current episode
    over: Bool[Array, " B"]  # the last step ended the episode
    key: jax.Array
    episode: EpisodeStats


class MinAtar:
    """A game that implements `envs.protocol.Env`. Rewards are never clipped.

    Args:
        env_id: one of `GAMES`.
        num_envs: number of games that step together.
        seed: seed of the games' randomness.

    Raises:
        ImportError: the extra is not installed.
    """

    saveable = True
    stacks_frames = False

    def __init__(self, env_id: str, num_envs: int, seed: int):
        if not is_installed():
            raise ImportError(f"{env_id}: {NEEDED}")
        import pgx

        self.num_envs = num_envs
        name, self.reward_range = GAMES[env_id]
        self.game = pgx.make(name)
        self.num_actions = self.game.num_actions
        self.obs_spec = jax.ShapeDtypeStruct(self.game.observation_shape, jnp.uint8)
        self.seed = own_seed(seed)

    def _start(self, key: jax.Array) -> Any:
        game = jax.vmap(self.game.init)(jax.random.split(key, self.num_envs))
        # Asterix has an unused array without elements, which checkpoints cannot store
        return jax.tree.map(lambda x: x if x.size else jnp.zeros(self.num_envs, x.dtype), game)

    def reset(self) -> tuple[MinAtarState, UInt8[Array, "B 10 10 C"]]:
        """Start a new game in each environment."""
        key, draw = jax.random.split(jax.random.key(self.seed))
        game = jax.jit(self._start)(draw)
        none = jnp.zeros(self.num_envs, jnp.int32), jnp.zeros(self.num_envs, bool)
        return MinAtarState(game, *none, key, EpisodeStats.zeros(self.num_envs)), game.observation.astype(jnp.uint8)

    def step(self, state: MinAtarState, action: Int[Array, " B"]) -> tuple[MinAtarState, Timestep]:
        """Step every game; see `envs.protocol.Timestep`."""
        key, draw, draw_start = jax.random.split(state.key, 3)
        valid = ~state.over
        stepped = jax.vmap(self.game.step)(state.game, action, jax.random.split(draw, self.num_envs))

        def choose(stepped, fresh):
            return jnp.where(valid.reshape(-1, *(1,) * (stepped.ndim - 1)), stepped, fresh)

        game = jax.tree.map(choose, stepped, self._start(draw_start))
        reward = game.rewards[:, 0]  # 0 for a new game
        steps = jnp.where(valid, state.steps + 1, 0)
        terminated = game.terminated
        truncated = (steps == TIME_LIMIT) & ~terminated
        episode = state.episode.update(reward, valid, terminated | truncated)
        timestep = Timestep(game.observation.astype(jnp.uint8), reward, terminated, truncated, valid, episode)
        return MinAtarState(game, steps, terminated | truncated, key, episode), timestep

    def render(self, state: MinAtarState) -> UInt8[np.ndarray, "160 160 3"]:
        """Draw the grid of the first game; see `in_colors`."""
        return in_colors(np.asarray(state.game.observation[0])).repeat(CELL_PIXELS, 0).repeat(CELL_PIXELS, 1)

    def exact_metrics(self, policy: Callable) -> dict[str, Array]:
        """Return no metrics: a game's dynamics are a program, not a table."""
        return {}
