"""Small environments and helpers whose right answers are known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.protocol import Env, EpisodeStats, Timestep


class CueState(NamedTuple):
    cue: jax.Array
    key: jax.Array
    over: jax.Array
    episode: EpisodeStats


class CueEnv(Env):
    """One-step episodes: the observation shows which of the actions pays 1; the optimal value is 1. Written in JAX, with the
    dummy step after each episode that emulators have."""

    reward_range = (0.0, 1.0)

    def __init__(self, num_envs, num_actions=3):
        self.num_envs, self.num_actions = num_envs, num_actions
        self.obs_spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.reset()[1])

    def _obs(self, cue):
        return jax.nn.one_hot(cue, self.num_actions)

    def reset(self):
        cue = jnp.arange(self.num_envs) % self.num_actions
        over = jnp.zeros(self.num_envs, bool)
        return CueState(cue, jax.random.key(0), over, EpisodeStats.zeros(self.num_envs)), self._obs(cue)

    def step(self, state, action):
        key, cue_key = jax.random.split(state.key)
        valid = ~state.over
        reward = jnp.where(valid, (action == state.cue).astype(jnp.float32), 0.0)
        cue = jnp.where(state.over, jax.random.randint(cue_key, (self.num_envs,), 0, self.num_actions), state.cue)
        episode = state.episode.update(reward, valid, valid)
        state = CueState(cue, key, valid, episode)
        return state, Timestep(self._obs(cue), reward, valid, jnp.zeros_like(valid), valid, episode)


class PixelCueEnv(CueEnv):
    """The same, the cue drawn as a bright square in Atari's frames."""

    def _obs(self, cue):
        lit = jnp.arange(84) // 28 == cue[:, None]
        frame = jnp.where(lit[:, :, None] & (jnp.arange(84) < 28), 200, 30).astype(jnp.uint8)
        return jnp.broadcast_to(frame[:, None], (self.num_envs, 4, 84, 84))


def random_steps(module, key, num_steps, num_envs, obs_shape=(4, 84, 84), num_actions=4):
    """A rollout of noise, with ends of all kinds, as the script `module` records it."""
    keys = jax.random.split(key, 8)
    shape = (num_steps, num_envs)
    terminated = jax.random.bernoulli(keys[0], 0.2, shape)
    truncated = jax.random.bernoulli(keys[1], 0.1, shape) & ~terminated
    valid = np.ones(shape, bool)
    done = np.asarray(terminated | truncated)
    for t in range(1, num_steps):
        valid[t] = ~(done[t - 1] & valid[t - 1])
    valid = jnp.asarray(valid)
    obs = jax.random.randint(keys[2], (num_steps + 1, num_envs, *obs_shape), 0, 255).astype(jnp.uint8)
    return module.Rollout(
        obs=obs,
        value=jax.random.normal(keys[3], (num_steps + 1, num_envs)),
        action=jax.random.randint(keys[4], shape, 0, num_actions),
        log_probs=jax.nn.log_softmax(0.1 * jax.random.normal(keys[5], (*shape, num_actions))),
        reward=jnp.where(valid, jax.random.normal(keys[6], shape), 0.0),
        terminated=terminated & valid,
        truncated=truncated & valid,
        valid=valid,
        episode=EpisodeStats.zeros(num_envs),
        unseen_end=jnp.zeros(shape, bool),
    )


def state_without_env(module, params, optimizer):
    """A training state around given parameters, for calling `update` without an environment."""
    return module.TrainState(params, optimizer.init(params), None, None, jax.random.key(0), jnp.zeros((), jnp.int32))


def make_iteration(script, env, agent, optimizer, args):
    """A rollout and the update on it, as one program."""
    return jax.jit(lambda state: script.learn(*script.rollout(state, env, agent, args), env, agent, optimizer, args))
