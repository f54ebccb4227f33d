"""Metrics of an update and of its rollout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Scalar

from utils.losses import masked_mean
from utils.occasionally import MEASURED


def scan_with_metrics(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """Run `jax.lax.scan`, and store the step's many small outputs (floats or flags) as one array. Stored
    separately, each takes a GPU kernel, in total a tenth of PPO's update. Integers become float32, exact up to 2^24."""
    unravel = None

    def step_kept(carry, x):
        nonlocal unravel
        carry, metrics = step(carry, x)
        kept, unravel = ravel_pytree(metrics)
        return carry, kept

    carry, kept = jax.lax.scan(step_kept, carry, xs)
    return carry, jax.vmap(unravel)(kept)


def summarize(metrics: dict[str, Float[Array, "K ..."]], ran: Bool[Array, " K"], num_minibatches: int) -> dict[str, Scalar]:
    """Average the metrics of an update over those of its K minibatches that ran. `spi/ratio_max` and `_min` (extremes) and
    `spi/outside_fraction` cover only the last `num_minibatches`, each measured before its own gradient step."""
    last = ran & (jnp.arange(ran.shape[0]) >= jnp.sum(ran) - num_minibatches)
    mean = jax.vmap(partial(masked_mean, valid=ran), in_axes=-1)  # over minibatches, for each bin of a histogram
    reduced = {name: mean(value.reshape(len(ran), -1)).reshape(value.shape[1:]) for name, value in metrics.items()}
    return reduced | {
        "spi/ratio_max": jnp.max(jnp.where(last, metrics["spi/ratio_max"], -jnp.inf)),
        "spi/ratio_min": jnp.min(jnp.where(last, metrics["spi/ratio_min"], jnp.inf)),
        "spi/outside_fraction": masked_mean(metrics["spi/outside_fraction"], last),
    }


def rollout_metrics(params: Any, steps: Any, advantages: Float[Array, "T B"], env: Any, agent: Any) -> dict[str, Array]:
    """Return the metrics of a rollout (of advantages before normalization), and exact ones of the policy with `params` if the
    environment's dynamics are known."""

    def policy(obs):
        z = agent.encoder.apply(params.encoder, obs)
        return z, jax.nn.softmax(agent.actor_critic.apply(params.actor_critic, z, obs)[0])

    episode, mean = steps.episode, partial(masked_mean, valid=steps.valid)
    return env.exact_metrics(policy) | explained_variance(advantages, advantages + steps.value[:-1], steps.valid) | {
        "losses/mean_value": mean(steps.value[:-1]),
        "losses/advantage_std": jnp.sqrt(mean((advantages - mean(advantages)) ** 2)),
        "charts/episodic_return": masked_mean(episode.episode_return, episode.to_count()),
        "charts/episodic_length": masked_mean(episode.episode_length, episode.to_count()),
        "charts/episodes": jnp.sum(episode.to_count()),
    }  # fmt: skip


def explained_variance(
    error: Float[Array, "*shape"], target: Float[Array, "*shape"], valid: Bool[Array, "*shape"]
) -> dict[str, Scalar]:
    """Return the fraction of the targets' variance that the critic explains, 1 - var(error) / var(target). It is marked as not
    measured if all targets are equal up to rounding."""
    variance = lambda x: masked_mean((x - masked_mean(x, valid)) ** 2, valid)  # noqa: E731
    varies = ~(variance(target) <= 1e-12 * masked_mean(target**2, valid))  # True for NaN, so that NaN is logged
    explained = 1.0 - variance(error) / jnp.where(varies, variance(target), 1.0)
    name = "losses/explained_variance"
    return {name: explained, name + MEASURED: varies.astype(jnp.float32)}
