"""Measure the terms of zeta (docs/guarantees.md) while a script trains."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from utils.guarantees.bounds import aged_bound, episodic_bound, is_vacuous, local_error, value_lipschitz, value_span
from utils.losses import masked_mean
from utils.neighborhood import ratio_metrics
from utils.occasionally import occasionally
from utils.runs.flag_types import MAY_CHANGE, Count, Needs, Switch
from utils.runs.flags import require

PREFIX = "spi/bound/"  # prefix of all names; inf means unbounded or unknown, and is not logged


@dataclass
class MonitorArgs:
    """Flags of the monitor."""

    monitor_guarantee: Switch = False
    """measure the terms of the safe-policy-improvement bound on the fresh rollout (docs/guarantees.md)"""
    monitor_every: Annotated[Count, MAY_CHANGE, Needs(monitor_guarantee=True)] = 20
    """updates between two measurements"""

    def check(self) -> None:
        """Raise UsageError if returns are unbounded."""
        require(
            not self.monitor_guarantee or self.gamma < 1,
            f"--monitor-guarantee: returns are bounded only for --gamma below 1, not {self.gamma}; lower --gamma",
        )


def monitor_occasionally(
    state: Any,
    agent: Any,
    old: Any,
    steps: Any,
    log_ratios: Callable[[], Float[Array, "T B A"]],
    key: jax.Array,
    args: Any,
    reward_range: tuple[float, float],
) -> dict[str, Array]:
    """Run `monitor` after the first update, and then every `--monitor-every` updates. `state` is the script's state after the
    update. `log_ratios` is called only when a measurement is due."""

    def measure():
        return monitor(agent, old, state.params, steps, log_ratios(), key, args, reward_range)

    return occasionally(state.iteration - 1, args.monitor_every, measure, PREFIX)


def monitor(
    agent: Any,
    old: Any,
    new: Any,
    steps: Any,
    log_ratios: Float[Array, "T B A"],
    key: jax.Array,
    args: Any,
    reward_range: tuple[float, float],
) -> dict[str, Array]:
    """Measure the terms of zeta on the rollout of the policy before the update.

    Args:
        agent: a script's networks.
        old, new: their parameters before and after the update.
        steps: the rollout of the old policy.
        log_ratios: log pi'(a|s) - log pi(a|s) of all actions at its states, pi' being the new policy; 0 where not valid.
        key: draws the next latents that the model predicts.
        args: the script's flags.
        reward_range: the environment's reward range.
    """
    mean = partial(masked_mean, valid=steps.valid)
    span = value_span(reward_range, args.gamma)
    terms = partial(model_terms, agent=agent, steps=steps, key=key, args=args, reward_range=reward_range)
    reward_error, distance, constants = terms(new)
    error = local_error(reward_error, distance, constants["k_value"], args.gamma, span)
    old_reward_error, old_distance, old_constants = terms(old)
    old_error = local_error(old_reward_error, old_distance, old_constants["k_value"], args.gamma, span)

    ratios = ratio_metrics(log_ratios, steps.valid, args.clip_coef)
    ratio_max = ratios["spi/ratio_max"]
    ratio = jnp.exp(jnp.take_along_axis(log_ratios, steps.action[..., None], axis=-1)[..., 0])
    lengths = steps.episode.previous_age[-1]
    # short episodes finish first: unknown until each environment has finished one
    length = jnp.where(jnp.all(lengths > 0), jnp.mean(lengths), jnp.inf)
    ages = steps.episode.age - 1  # `age` counts the step itself

    bound = partial(episodic_bound, gamma=args.gamma, episode_length=length)
    zeta = bound(mean(error), ratio_max) + bound(mean(old_error), 1.0)
    aged = partial(aged_bound, ages=ages, valid=steps.valid, gamma=args.gamma, episode_length=length)
    zeta_stepwise = aged(ratio * error, ratio_max=ratio_max) + aged(old_error, ratio_max=1.0)
    measured = {name.removeprefix("spi/"): value for name, value in ratios.items()} | constants
    measured |= {
        "reward_error": mean(reward_error),
        "transition_error": mean(distance),
        "episode_length": length,
        "zeta": zeta,
        "zeta_stepwise": zeta_stepwise,
        "value_span": jnp.asarray(span),
        "vacuous": is_vacuous(jnp.minimum(zeta, zeta_stepwise), span).astype(jnp.float32),
    }
    return {PREFIX + name: value for name, value in measured.items()}


def model_terms(
    params: Any, agent: Any, steps: Any, key: jax.Array, args: Any, reward_range: tuple[float, float]
) -> tuple[Float[Array, "T B"], Float[Array, "T B"], dict[str, Array]]:
    """Return |R - Rbar| and d(phi(s'), z') of each transition, and the Lipschitz constants. Both are 0 where a step is
    not valid; d is also 0 where the episode ends.

    Rbar is the reward network's output clipped to the reward range, which brings it closer to any reward. For continuous
    latents, d is the Euclidean distance to a sample z'. For categorical ones, d is 0 if the two are equal and 1 otherwise; the
    function returns its expectation, the probability that the model gives to all latents other than phi(s').
    """
    shape = steps.action.shape
    z = jax.lax.map(lambda t: agent.encoder.apply(params.encoder, steps.obs[t]), jnp.arange(len(steps.obs)))
    z = z.reshape(-1, *z.shape[2:])
    n = steps.action.size
    z, next_z, action = z[:n], z[-n:], steps.action.reshape(-1)
    predicted_reward = jnp.clip(agent.reward.apply(params.reward, z, action), *reward_range)
    predicted = agent.transition.apply(params.transition, z, action)
    span = value_span(reward_range, args.gamma)
    if args.latent == "categorical":
        distance = 1.0 - jnp.exp(jnp.sum(predicted.log_prob(next_z), axis=-1))
        constants = {"k_value": jnp.asarray(span)}  # different latents are at distance 1
    else:
        distance = jnp.linalg.norm((predicted.sample(key) - next_z).reshape(n, -1), axis=-1)
        certified = jnp.asarray(args.lipschitz_constant if args.lipschitz_nets else jnp.inf)
        policy = agent.actor_critic.policy_lipschitz(params.actor_critic)
        k_value = value_lipschitz(certified, certified, policy, args.gamma, span)  # assumes terminations independent of z
        constants = {"k_reward": certified, "k_transition": certified, "k_policy": policy, "k_value": k_value}
    going_on = steps.valid & ~(steps.terminated | steps.truncated)
    reward_error = jnp.where(steps.valid, jnp.abs(steps.reward - predicted_reward.reshape(shape)), 0.0)
    return reward_error, jnp.where(going_on, distance.reshape(shape), 0.0), constants
