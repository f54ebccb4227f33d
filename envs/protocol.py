"""The interface between scripts and environments, for emulators and pure JAX environments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from envs.observations import Part

DEVICES = "devices"  # axis of the device mesh along which the environments are divided


def own_seed(*seed: int) -> int:
    """Return a seed for a JAX environment. With the run's own seed, it would draw the same random numbers as the script. More
    numbers, such as the iteration at which a run resumes, give other seeds."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


class EpisodeStats(NamedTuple):
    """Statistics of each environment's current episode. A lost life does not end it, and its return is never clipped. Only
    `age` restarts with each life, that is, after every step that returned `terminated` or `truncated`."""

    episode_return: Float[Array, " B"]  # sum of unclipped, undiscounted rewards so far
    episode_length: Int[Array, " B"]  # steps so far, without reset steps
    finished: Bool[Array, " B"]  # True if the last step ended the episode; the two fields above are then its totals
    age: Int[Array, " B"]  # steps since the agent's last start, after a reset or a lost life
    previous_age: Int[Array, " B"]  # `age` just before that start; 0 at first
    counts: Bool[Array, " B"]  # False for an environment restarted by a resumed run, until its first episode is over

    @classmethod
    def zeros(cls, num_envs: int, midway: bool = False) -> "EpisodeStats":
        """Return the statistics before the first step. Set `midway` if a resumed run restarts the environments."""
        zeros = (jnp.zeros(num_envs, jnp.int32) for _ in range(3))  # separate arrays, so that they can be donated
        return cls(jnp.zeros(num_envs), next(zeros), jnp.zeros(num_envs, bool), *zeros, jnp.full(num_envs, not midway))

    def update(self, reward: Float[Array, " B"], valid: Bool[Array, " B"], finished: Bool[Array, " B"]) -> "EpisodeStats":
        """Return the statistics after a step with this unclipped reward. If the last episode had ended, a new one starts."""
        episode_return = jnp.where(self.finished, 0.0, self.episode_return) + jnp.where(valid, reward, 0.0)
        episode_length = jnp.where(self.finished, 0, self.episode_length) + valid
        begins = self.finished & valid  # an environment without reset steps
        age = jnp.where(valid, jnp.where(begins, 0, self.age) + 1, 0)
        # after a reset step age is 0 and already kept, even if a game ended in it (in no-ops after a lost life)
        previous_age = jnp.where((valid & ~begins) | (self.age == 0), self.previous_age, self.age)
        return EpisodeStats(episode_return, episode_length, finished, age, previous_age, self.counts | self.finished)

    def to_count(self) -> Bool[Array, "*T B"]:
        """Return True where an episode ended that counts toward mean returns.

        Environments that start together finish short episodes first, which biases the mean down if surviving earns reward. In
        a resumed run this would look like a worse policy, so no episode counts until every environment has finished one.
        """
        return self.finished & jnp.all(self.counts, axis=-1, keepdims=True)


class Timestep(NamedTuple):
    """What a step of B environments returns.

    If a step returns `terminated` or `truncated`, its `obs` is the terminal observation. The next step is a reset step: it
    ignores its action and returns the first observation of a new episode, with reward 0 and both flags False. Its `valid` is
    False: it is not a transition, and nothing may learn from it.

    Some environments reset within the step that ends an episode. Their terminal observation is unknown: `obs` is already the
    first one of the next episode, and no reset step follows. `unseen_end` marks such a step. A termination is still learned
    from, except by the world model's transition. `valid` is False if the step was truncated: its value is unknown too.
    """

    obs: Num[Array, "B *obs"]
    reward: Float[Array, " B"]  # used for training: clipped if the environment clips
    terminated: Bool[Array, " B"]  # the episode is over: do not bootstrap
    truncated: Bool[Array, " B"]  # cut off by a time limit: bootstrap from the value of `obs`
    valid: Bool[Array, " B"]
    episode: EpisodeStats
    unseen_end: Bool[Array, " B"] | bool = False


class Env:
    """B environments that step together: what scripts need of an environment. `reset`, `step`, and the attributes without a
    value here have to be provided; the rest has defaults.

    For videos, an environment also needs a method `render(state)`, which returns an image of the first environment,
    UInt8[np.ndarray, "H W 3"], on the host. `envs.jax_env.JaxEnv` is the shortest way to an environment written in JAX.
    """

    num_envs: int
    num_actions: int
    obs_spec: jax.ShapeDtypeStruct  # observation of one environment
    obs_parts: tuple[Part, ...] | None = None  # what its numbers are, if shape and dtype do not say it (`envs.observations`)
    reward_range: tuple[float, float] = (-np.inf, np.inf)  # of the rewards used for training; infinite if unknown
    saveable: bool = True  # the state is complete, so a checkpoint can store it and a resumed run is bit-exact
    resets_within: bool = False  # the step that ends an episode starts the next one: terminal observations are unknown
    stacks_frames: bool = False  # observations are stacked frames; `envs.frames` stores only the newest one

    def reset(self) -> tuple[Any, Num[jax.Array, "B *obs"]]:
        """Reset. Return the state to thread through `step`, and the first observations. No array may be in both: scripts donate
        them."""
        raise NotImplementedError("define reset(self)")

    def step(self, state: Any, action: Int[Array, " B"]) -> tuple[Any, Timestep]:
        """Step every environment. Pure in the state and jittable."""
        raise NotImplementedError("define step(self, state, action)")

    def exact_metrics(self, policy: Callable[[Num[Array, "N *obs"]], tuple[Array, Array]]) -> dict[str, Array]:
        """Compute metrics of a policy to log, from the environment's dynamics if they are known. Jittable.

        `policy` maps observations to latents and action probabilities.
        """
        return {}
