"""Play whole games with a fixed policy."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, UInt8

from envs.protocol import Env

CHUNK = 100  # steps between two checks for finished games
Policy = Callable[[Num[Array, "B *obs"]], Float[Array, "B A"]]


class Game(NamedTuple):
    """A whole game, over all lives."""

    env: int
    episodic_return: float  # unclipped, undiscounted
    episodic_length: int  # steps of the agent
    truncated: bool  # cut off by the time limit


def policy_of(params: Any, agent: Any) -> Policy:
    """Return a function from observations to the logits of a script's actor."""
    return lambda obs: agent.actor_critic.apply(params.actor_critic, agent.encoder.apply(params.encoder, obs), obs)[0]


def quotas(episodes: int, num_envs: int) -> Int[np.ndarray, " B"]:
    """Return how many games each environment plays, as evenly as possible. Fixing this in advance avoids bias: taking the first
    games to finish would favor short ones."""
    return episodes // num_envs + (np.arange(num_envs) < episodes % num_envs)


def choose(key: jax.Array, logits: Float[Array, "B A"], greedy: bool) -> Int[Array, " B"]:
    """Return the most likely actions if `greedy`, else draw actions from the policy."""
    return jnp.argmax(logits, axis=-1) if greedy else jax.random.categorical(key, logits)


def play(
    env: Env, policy: Policy, episodes: int, key: jax.Array, greedy: bool = False, on_progress: Callable = lambda done: None
) -> list[Game]:
    """Play whole games in all environments in parallel, a fixed number in each.

    Args:
        env: environments as in training. A game continues after an episode that ended with a lost life.
        policy: maps observations to logits of actions.
        episodes: total number of games.
        key: draws the actions.
        greedy: take the most likely action instead.
        on_progress: called with the number of games played, every `CHUNK` steps.
    """
    quota = quotas(episodes, env.num_envs)

    @jax.jit
    def steps(carry):
        def step(carry, _):
            env_state, obs, key = carry
            key, draw = jax.random.split(key)
            env_state, after = env.step(env_state, choose(draw, policy(obs), greedy))
            episode = after.episode
            ended = episode.finished, episode.episode_return, episode.episode_length, after.truncated
            return (env_state, after.obs, key), ended

        return jax.lax.scan(step, carry, length=CHUNK)

    games, carry = [[] for _ in quota], (*env.reset(), key)
    while any(len(own) < wanted for own, wanted in zip(games, quota, strict=True)):
        carry, ended = steps(carry)
        finished, returns, lengths, truncated = jax.device_get(ended)
        for t, i in np.argwhere(finished):
            if len(games[i]) < quota[i]:
                games[i].append(Game(int(i), float(returns[t, i]), int(lengths[t, i]), bool(truncated[t, i])))
        on_progress(sum(map(len, games)))
    return [game for own in games for game in own]


class Film:
    """Plays a game and renders it: `frames` yields the first image and one after each step.

    Args:
        env: a single environment with a method `render`.
        policy, greedy: as for `play`, but `policy` takes the parameters first, so that it is compiled once.

    Attributes:
        game: the game played; None until it has ended.
    """

    def __init__(self, env: Env, policy: Callable[[Any, Num[Array, "B *obs"]], Float[Array, "B A"]], greedy: bool = False):
        self.env, self.game = env, None

        def step(params, env_state, obs, key):
            return env.step(env_state, choose(key, policy(params, obs), greedy))

        self._step = jax.jit(step)

    def frames(self, params: Any, key: jax.Array, most: int | None = None) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yield the images of one game, at most `most`. The key draws the actions."""
        env_state, obs = self.env.reset()
        taken, self.game = 1, None
        yield self.env.render(env_state)
        while most is None or taken < most:
            key, draw = jax.random.split(key)
            env_state, after = self._step(params, env_state, obs, draw)
            obs, episode = after.obs, after.episode
            if bool(after.valid[0]):
                taken += 1
                yield self.env.render(env_state)
            if bool(episode.finished[0]):
                truncated = bool(after.truncated[0])
                self.game = Game(0, float(episode.episode_return[0]), int(episode.episode_length[0]), truncated)
                return
