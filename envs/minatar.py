"""MinAtar: five Atari games on a grid of 10 x 10 cells (Young & Tian, 2019), in JAX, by pgx.

The games come from the library pgx-minatar, an optional extra because of its license (GPL-3): `uv run --extra minatar ...`. An
action is replaced by the previous one with probability 0.1 (sticky actions), and some games get harder over time. The actions
are those with an effect in the game. An observation has one binary map per type of object. A time limit truncates.
docs/environments.md lists differences from the original.
"""

import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from envs.jax_env import JaxEnv, JaxState

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
    return COLORS[np.where(kind > 0, (kind - 1) % (len(COLORS) - 1) + 1, 0)]  # more types than colors: they repeat


def is_installed() -> bool:
    """Return True if the packages of the extra are installed."""
    return all(importlib.util.find_spec(name) for name in PACKAGES)


class MinAtar(JaxEnv):
    """B games that step together. Rewards are never clipped.

    Args:
        env_id: one of `GAMES`.
        num_envs: number of games that step together.
        seed: seed of the games' randomness.

    Raises:
        ImportError: the extra is not installed.
    """

    time_limit = TIME_LIMIT

    def __init__(self, env_id: str, num_envs: int, seed: int):
        if not is_installed():
            raise ImportError(f"{env_id}: {NEEDED}")
        import pgx

        name, self.reward_range = GAMES[env_id]
        self.rules = pgx.make(name)
        self.num_actions = self.rules.num_actions
        super().__init__(num_envs, seed)

    def start_one(self, key: jax.Array) -> Any:
        """Return the library's state of a new game."""
        # Asterix has an unused array without elements, which checkpoints cannot store
        return jax.tree.map(lambda x: x if x.size else jnp.zeros((), x.dtype), self.rules.init(key))

    def observe_one(self, game: Any) -> UInt8[Array, "10 10 C"]:
        """Return one binary map per type of object."""
        return game.observation.astype(jnp.uint8)

    def step_one(self, key: jax.Array, game: Any, action: Int[Array, ""]) -> tuple[Any, Array, Array, Array]:
        """Play one step by the rules."""
        game = self.rules.step(game, action, key)
        return game, game.rewards[0], game.terminated, jnp.zeros_like(game.terminated)

    def render(self, state: JaxState) -> UInt8[np.ndarray, "160 160 3"]:
        """Draw the grid of the first game; see `in_colors`."""
        return in_colors(np.asarray(state.game.observation[0])).repeat(CELL_PIXELS, 0).repeat(CELL_PIXELS, 1)
