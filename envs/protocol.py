"""What a script asks of an environment. Emulators and pure JAX environments alike satisfy it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

DEVICES = "devices"  # the axis of the device mesh along which environments are divided


def own_seed(seed: int) -> int:
    """A seed for an environment in JAX: with the run's own, its numbers would be those that the script draws from that."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


class EpisodeStats(NamedTuple):
    """The running episode of each environment. Lost lives do not end it, clipping does not touch its return; `age` alone
    starts anew with each life, that is, after every step that returned `terminated` or `truncated`."""

    episode_return: Float[Array, " B"]  # sum of unclipped, undiscounted rewards so far
    episode_length: Int[Array, " B"]  # steps so far, those that only reset the environment left out
    finished: Bool[Array, " B"]  # true where the last step ended the episode: the two above are then its totals
    age: Int[Array, " B"]  # steps since the environment started anew for the agent
    previous_age: Int[Array, " B"]  # what it was when that happened; 0 before the first time
    counts: Bool[Array, " B"]  # false if it began anew in the middle of a run, until its first episode is over

    @classmethod
    def zeros(cls, num_envs: int, midway: bool = False) -> "EpisodeStats":
        """No step taken yet; of environments that began anew in the middle of a run, or not."""
        zeros = (jnp.zeros(num_envs, jnp.int32) for _ in range(3))  # an array each, or they could not be donated
        return cls(jnp.zeros(num_envs), next(zeros), jnp.zeros(num_envs, bool), *zeros, jnp.full(num_envs, not midway))

    def update(self, reward: Float[Array, " B"], valid: Bool[Array, " B"], finished: Bool[Array, " B"]) -> "EpisodeStats":
        """The statistics after a step with the given *unclipped* reward; an episode that had ended starts anew."""
        episode_return = jnp.where(self.finished, 0.0, self.episode_return) + jnp.where(valid, reward, 0.0)
        episode_length = jnp.where(self.finished, 0, self.episode_length) + valid
        age = jnp.where(valid, self.age + 1, 0)
        previous_age = jnp.where(valid, self.previous_age, self.age)
        return EpisodeStats(episode_return, episode_length, finished, age, previous_age, self.counts | self.finished)

    def to_count(self) -> Bool[Array, "*T B"]:
        """Where an episode ended that belongs into a mean.

        Environments that began together end their short episodes first, so that the mean of what ended until then is too low
        (where to live is to earn). After a run has begun anew in its middle, no episode counts before each environment has
        ended its first: that would look like a policy that got worse.
        """
        return self.finished & jnp.all(self.counts, axis=-1, keepdims=True)


class Timestep(NamedTuple):
    """What the step that took `action` in the observation before it returned, for B environments.

    After a step that returned `terminated` or `truncated`, `obs` is the last observation of that episode. The *next* step
    ignores its action, returns the first observation of a new episode, reward 0 and both flags false, and is marked by
    `valid` false: it is no transition, and nothing may learn from it.
    """

    obs: Num[Array, "B *obs"]
    reward: Float[Array, " B"]  # as the agent is trained on it: clipped where the environment clips
    terminated: Bool[Array, " B"]  # nothing follows: do not bootstrap
    truncated: Bool[Array, " B"]  # cut off by a time limit: bootstrap from the value of `obs`
    valid: Bool[Array, " B"]
    episode: EpisodeStats


@runtime_checkable
class Env(Protocol):
    """B environments that step together. One that is to be filmed has a method `render` besides, which takes the state and
    returns what a person sees of the first environment, UInt8[np.ndarray, "H W 3"] on the host."""

    num_envs: int
    num_actions: int
    obs_spec: jax.ShapeDtypeStruct  # of one environment's observation
    stacks_frames: bool  # an observation is a stack of frames, of which `envs.frames` stores the newest
    reward_range: tuple[float, float]  # of the rewards that the agent is trained on; infinite where not known
    saveable: bool  # the state that it returns is all there is of it: a checkpoint holds it, and a run goes on to the bit

    def reset(self) -> tuple[Any, Num[jax.Array, "B *obs"]]:
        """Start anew: the state to thread through `step`, and the first observations."""

    def step(self, state: Any, action: Int[Array, " B"]) -> tuple[Any, Timestep]:
        """One step of every environment. Pure in the state and jittable."""

    def exact_metrics(self, policy: Callable[[Num[Array, "N *obs"]], tuple[Array, Array]]) -> dict[str, Array]:
        """What can be computed about a policy from the environment's dynamics where these are known, to be logged.

        `policy` maps observations to latents and action probabilities. Jittable.
        """
