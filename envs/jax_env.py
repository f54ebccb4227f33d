"""Environments written in JAX: from the rules for one game to an `Env` of B games; adapters for gymnax's and octax's games."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from envs.observations import is_image
from envs.protocol import Env, EpisodeStats, Timestep, own_seed

LIMITS = ("max_steps_in_episode", "max_timesteps")  # names of the time limit in parameters of gymnax's and Craftax's games
ENDLESS = 2**30


class JaxState(NamedTuple):
    """State of B games."""

    game: Any  # the state of each game, arrays [B, ...]
    steps: Int[Array, " B"]  # taken in the current episode
    over: Bool[Array, " B"]  # the last step ended the episode
    key: jax.Array
    episode: EpisodeStats


class JaxEnv(Env):
    """B games in JAX. A subclass sets `num_actions`, writes three methods for one game, and calls `super().__init__`.

    This class vectorizes the game with `jax.vmap`, resets it, truncates episodes at the time limit, and records returns.

    Args:
        num_envs: number of games that step together.
        seed: seed of all randomness in the games.
    """

    time_limit: int | None = None  # steps after which an episode is truncated

    def __init__(self, num_envs: int, seed: int):
        self.num_envs, self.seed = num_envs, own_seed(seed)
        obs = jax.eval_shape(lambda key: self.observe_one(self.start_one(key)), jax.random.key(0))
        self.obs_spec = jax.ShapeDtypeStruct(obs.shape, obs.dtype)

    def start_one(self, key: jax.Array) -> Any:
        """Return the state of a new game: any pytree of arrays."""
        raise NotImplementedError("define start_one(self, key)")

    def observe_one(self, game: Any) -> Num[Array, "*obs"]:
        """Return the observation of a game."""
        raise NotImplementedError("define observe_one(self, game)")

    def step_one(
        self, key: jax.Array, game: Any, action: Int[Array, ""]
    ) -> tuple[Any, Float[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
        """Return the next state, the reward, and whether the episode terminates or is truncated there. With `time_limit`, the
        last is False everywhere."""
        raise NotImplementedError("define step_one(self, key, game, action)")

    def _start(self, key: jax.Array) -> Any:
        return jax.vmap(self.start_one)(jax.random.split(key, self.num_envs))

    def reset(self) -> tuple[JaxState, Num[Array, "B *obs"]]:
        """Start a new game in each environment."""
        key, draw = jax.random.split(jax.random.key(self.seed))
        game = jax.jit(self._start)(draw)
        none = jnp.zeros(self.num_envs, jnp.int32), jnp.zeros(self.num_envs, bool)
        obs = jax.jit(jax.vmap(self.observe_one))(game)  # jitted: copies what is in the state too, because both are donated
        return JaxState(game, *none, key, EpisodeStats.zeros(self.num_envs)), obs

    def step(self, state: JaxState, action: Int[Array, " B"]) -> tuple[JaxState, Timestep]:
        """Step every game; see `envs.protocol.Timestep`."""
        key, draw, draw_start = jax.random.split(state.key, 3)
        played = ~state.over
        keys = jax.random.split(draw, self.num_envs)
        game, reward, terminated, truncated = jax.vmap(self.step_one)(keys, state.game, action)
        reward = jnp.where(played, reward.astype(jnp.float32), 0.0)
        steps = jnp.where(played, state.steps + 1, 0)
        terminated = terminated & played
        truncated = truncated & played & ~terminated
        done = terminated | truncated
        cut = jnp.zeros_like(done) if self.time_limit is None else (steps == self.time_limit) & ~done
        truncated, done = truncated | cut, done | cut
        episode = state.episode.update(reward, played, done)

        def choose(keep, stepped, fresh):
            return jnp.where(keep.reshape(-1, *(1,) * (stepped.ndim - 1)), stepped, fresh)

        if self.resets_within:
            if self.time_limit is not None:  # of this limit the game knows nothing
                game = jax.tree.map(partial(choose, ~cut), game, self._start(draw_start))
            obs = jax.vmap(self.observe_one)(game)
            after = Timestep(obs, reward, terminated, truncated, ~truncated, episode, done)
            return JaxState(game, jnp.where(done, 0, steps), jnp.zeros_like(done), key, episode), after

        game = jax.tree.map(partial(choose, played), game, self._start(draw_start))
        after = Timestep(jax.vmap(self.observe_one)(game), reward, terminated, truncated, played, episode)
        return JaxState(game, steps, done, key, episode), after


class Adapted(JaxEnv):
    """Games of another library. The state of a game is the library's, with the observation that the library returned."""

    def observe_one(self, game: tuple[Any, Any]) -> Num[Array, "*obs"]:
        """Return the observation. Booleans become bytes, 0 or 255 in images, else 0 or 1."""
        obs = jnp.asarray(game[1])
        return obs.astype(jnp.uint8) * (255 if is_image(obs.shape) else 1) if obs.dtype == jnp.bool_ else obs


class Gymnax(Adapted):
    """A game with gymnax's interface (Lange, 2022): `reset(key, params)` and `step(key, state, action, params)`.

        def breakout(num_envs, seed):
            return Gymnax(*gymnax.make("Breakout-MinAtar"), num_envs, seed)

    `step` resets within the step that ends an episode. If the game also has `step_env` and `reset_env`, which do not, they are
    used, so that terminal observations are known. A time limit in the parameters then truncates, by `is_truncated` (gymnax 1)
    or by what would have ended without the limit.

    Args:
        game: has `reset` and `step`, and `num_actions` or `action_space(params).n`.
        params: its parameters.
        num_envs, seed: see `JaxEnv`.
    """

    def __init__(self, game: Any, params: Any, num_envs: int, seed: int):
        self.game, self.params = game, params
        self.num_actions = int(game.num_actions if hasattr(game, "num_actions") else game.action_space(params).n)
        whole = hasattr(game, "step_env") and hasattr(game, "reset_env")
        self.resets_within = not whole
        self._reset_game, self._step_game = (game.reset_env, game.step_env) if whole else (game.reset, game.step)
        self.limit = next((name for name in LIMITS if hasattr(params, name)), None)
        super().__init__(num_envs, seed)

    def start_one(self, key: jax.Array) -> Any:
        """Return the game's state and its observation."""
        obs, state = self._reset_game(key, self.params)
        return state, obs

    def step_one(self, key: jax.Array, game: Any, action: Int[Array, ""]) -> tuple[Any, Array, Array, Array]:
        """See `JaxEnv.step_one`."""
        obs, state, reward, ended, *told, _ = self._step_game(key, game[0], action, self.params)
        truncated = told[0] if told else False  # by the `step` of gymnax 1
        if not self.resets_within and hasattr(self.game, "is_truncated"):
            truncated = self.game.is_truncated(state, self.params)
        elif not self.resets_within and self.limit and hasattr(self.params, "replace"):
            endless = self.params.replace(**{self.limit: ENDLESS})
            if hasattr(self.game, "is_terminal") and not hasattr(state, "terminal"):
                over = self.game.is_terminal(state, endless)
            else:  # gymnax's older MinAtar games store the end, so ask for it from before the step
                over = self._step_game(key, game[0], action, endless)[3]
            ended, truncated = ended & over, ended & ~jnp.asarray(over, bool)
        ended = jnp.asarray(ended, bool)
        return (state, obs), jnp.asarray(reward, jnp.float32), ended, jnp.asarray(truncated, bool) & ~ended


class Octax(Adapted):
    """A game with octax's interface (CHIP-8 games): `reset(key)` returns (state, obs, info), and `step(state, action)` returns
    (state, obs, reward, terminated, truncated, info).

        def brix(num_envs, seed):
            return Octax(create_environment("brix")[0], num_envs, seed)

    Args:
        game: has `reset`, `step` and `num_actions`.
        num_envs, seed: see `JaxEnv`.
    """

    def __init__(self, game: Any, num_envs: int, seed: int):
        self.game, self.num_actions = game, int(game.num_actions)
        super().__init__(num_envs, seed)

    def start_one(self, key: jax.Array) -> Any:
        """Return the game's state and its observation."""
        return self.game.reset(key)[:2]

    def step_one(self, key: jax.Array, game: Any, action: Int[Array, ""]) -> tuple[Any, Array, Array, Array]:
        """See `JaxEnv.step_one`. The key is not used: the game's state has its own."""
        state, obs, reward, terminated, truncated, _ = self.game.step(game[0], action)
        return (state, obs), *(jnp.asarray(x) for x in (reward, terminated, truncated))
