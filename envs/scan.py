"""Step environments with a policy, inside `jax.lax.scan`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int8, Num

from envs.frames import Newest, Stacks, observations
from envs.pool import Pool, in_order
from envs.protocol import Env, Timestep

Act = Callable[[Num[Array, "B *obs"], jax.Array], tuple[Int[Array, " B"], Any]]


class Stepped(NamedTuple):
    """T steps of B environments: the T + 1 observations, the actions, the extra output of `act`, and what each step returned
    (without its observations, which are in `obs`)."""

    obs: Num[Array, "T+1 B *obs"] | Stacks
    action: Int[Array, "T B"]
    noted: Any
    after: Timestep


def scan_steps(
    act: Act, env: Env, env_state: Any, obs: Num[Array, "B *obs"], keys: jax.Array
) -> tuple[Any, Num[Array, "B *obs"], Stepped]:
    """Step every environment once for each of the T keys.

    Args:
        act: maps observations and a key to sampled actions and to extra outputs, arrays [B, ...]. With `Halves`, it acts in
            one half at a time.
        env, env_state, obs: the environments, their state and their current observations.

    Returns:
        The new state and observations, and all steps.
    """
    scan = _scan_halves if isinstance(env, Halves) else _scan
    env_state, last, (kept, action, noted, after) = scan(act, env, env_state, obs, keys)
    return env_state, last, Stepped(observations(obs, kept, keep(env, env_state, last)), action, noted, after)


def keep(env: Env, env_state: Any, obs: Num[Array, "B *obs"]) -> Newest | Num[Array, "B *obs"]:
    """Return what to store of an observation: only the newest frame if frames are stacked."""
    return Newest(obs[:, -1], env_state.age) if env.stacks_frames else obs


def without_obs(after: Timestep) -> Timestep:
    """Return what a step returned, for all environments, but its observations."""
    return after._replace(obs=None, unseen_end=jnp.broadcast_to(after.unseen_end, after.valid.shape))


def _scan(act: Act, env: Env, env_state: Any, obs: Num[Array, "B *obs"], keys: jax.Array) -> tuple[Any, Array, tuple]:
    def step(carry, key):
        env_state, obs = carry
        action, noted = act(obs, key)
        kept = keep(env, env_state, obs)
        env_state, after = env.step(env_state, action)
        return (env_state, after.obs), (kept, action, noted, without_obs(after))

    (env_state, obs), steps = jax.lax.scan(step, (env_state, obs), keys)
    return env_state, obs, steps


class HalvesState(NamedTuple):
    """The states of the two halves."""

    first: Any
    second: Any

    @property
    def age(self) -> Int8[Array, " B"]:
        """`age` of both halves, if they are `FrameState`s."""
        return jnp.concatenate([self.first.age, self.second.age])


class Halves(Env):
    """Two pools as one environment. In `scan_steps`, the policy acts in one half while the other half's emulators run.

    Args:
        first, second: pools of the same type; each has half of the environments, in order.
    """

    def __init__(self, first: Pool, second: Pool):
        self.first, self.second, self.num_envs = first, second, 2 * first.num_envs
        for name in (
            "num_actions",
            "obs_spec",
            "obs_parts",
            "resets_within",
            "stacks_frames",
            "reward_range",
            "saveable",
            "exact_metrics",
        ):
            setattr(self, name, getattr(first, name))

    def reset(self) -> tuple[HalvesState, Num[Array, "B *obs"]]:
        """See `Pool.reset`."""
        first, second = self.first.reset(), self.second.reset()
        return HalvesState(first[0], second[0]), jnp.concatenate([first[1], second[1]])

    def step(self, state: HalvesState, action: Int[Array, " B"]) -> tuple[HalvesState, Timestep]:
        """See `Pool.step`. Both halves step at the same time."""
        mine, theirs = jnp.split(action, 2)
        first = self.first.send(in_order(state.first, state.second), mine)
        second = self.second.send(in_order(state.second, first), theirs)
        first, after = self.first.receive(in_order(first, second))
        second, after_too = self.second.receive(in_order(second, first))
        return HalvesState(first, second), _join(after, after_too, axis=0)


def _join(first: Any, second: Any, axis: int) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis), first, second)


def _scan_halves(act: Act, env: Halves, env_state: Any, obs: Num[Array, "B *obs"], keys: jax.Array) -> tuple[Any, Array, tuple]:
    """`_scan` with the halves half a step apart: while the policy acts in one half, the emulators of the other half run. One
    handle passes through all calls and fixes their order: send first, receive second, send second, receive first, and so on.
    The state of the half that was called last holds the handle."""
    first, second = env.first, env.second
    keys = jax.vmap(jax.random.split)(keys)

    def send(pool, state, obs, key):
        action, noted = act(obs, key)
        return pool.send(state, action), (keep(pool, state, obs), action, noted)

    def receive(pool, state, earlier, begun):
        state, after = pool.receive(in_order(state, earlier))
        return state, after.obs, (*begun, without_obs(after))

    def half_step(carry, key):  # act in the second half, then wait for the first half's observations
        a, begun, b, obs = carry
        b, begun_too = send(second, b, obs, key)
        a, obs, step = receive(first, a, b, begun)
        return a, obs, step, b, begun_too

    def step(carry, keys):
        a, obs, done, b, begun_too = half_step(carry, keys[0])
        a, begun = send(first, a, obs, keys[1])
        b, obs, done_too = receive(second, b, a, begun_too)
        return (a, begun, b, obs), (done, done_too)

    mine, theirs = jnp.split(obs, 2)
    a, begun = send(first, in_order(env_state.first, env_state.second), mine, keys[0, 0])
    turns = jnp.stack([keys[:-1, 1], keys[1:, 0]], axis=1)
    carry, steps = jax.lax.scan(step, (a, begun, in_order(env_state.second, a), theirs), turns)
    a, mine, done, b, begun_too = half_step(carry, keys[-1, 1])
    b, theirs, done_too = receive(second, b, a, begun_too)
    last = jax.tree.map(lambda x: x[None], (done, done_too))
    first_half, second_half = _join(steps, last, axis=0)
    return HalvesState(a, b), jnp.concatenate([mine, theirs]), _join(first_half, second_half, axis=1)
