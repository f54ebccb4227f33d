"""The neighborhood N^C of a policy, C = 1 + eps: all policies with ratios to it in [2 - C, C] = [1 - eps, 1 + eps] for *every*
action. PPO's loss does not reward the taken action's ratio for moving further outside, but keeps no ratio inside."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from utils.losses import masked_mean
from utils.metrics import scan_with_metrics

Number = Float[Array, ""] | float

SHRINK = 0.7  # factor of each backtracking step
TRIES = 12  # step sizes per target, down to 0.7^11 = 0.02


def outside(log_ratios: Float[Array, "*batch A"], eps: Number) -> Bool[Array, "*batch"]:
    """Return True where the ratio of any action is outside [1 - eps, 1 + eps] or NaN."""
    ratios = jnp.exp(log_ratios)
    return ~jnp.all((ratios >= 1 - eps) & (ratios <= 1 + eps), axis=-1)


def ratio_metrics(log_ratios: Float[Array, "*batch A"], valid: Bool[Array, "*batch"], eps: Number) -> dict[str, Array]:
    """Return the extreme ratios, and the fraction of states at which the policy is outside the neighborhood.

    Args:
        log_ratios: log-ratios of all actions at the visited states; 0 where a step is not valid.
        valid: which steps count.
        eps: size of the neighborhood.
    """
    return {
        "spi/ratio_max": jnp.exp(jnp.max(log_ratios)),
        "spi/ratio_min": jnp.exp(jnp.min(log_ratios)),
        "spi/outside_fraction": masked_mean(outside(log_ratios, eps).astype(jnp.float32), valid),
    }


def backtrack(
    old: Any,
    targets: Sequence[Any],
    log_ratios: Callable[[Any], Float[Array, "*batch A"]],
    valid: Bool[Array, "*batch"],
    eps: Number,
) -> tuple[Any, dict[str, Array]]:
    """Find parameters between the old ones and a target, as close to the target as possible, that keep all ratios inside.

    Try old + f (target - old) for f = 1, 0.7, 0.49, ..., for each target in turn. If no candidate keeps all ratios inside,
    return old. This is TRPO's line search (Schulman et al., 2015) with N^C as the constraint. It is jittable, and each try
    costs one evaluation of the policy on all states.

    Args:
        old: parameters of the policy that visited the states, whose ratios are 1 up to rounding.
        targets: parameters to move toward, in order of preference.
        log_ratios: maps parameters to log-ratios of all actions at the visited states; 0 where a step is not valid.
        valid: which steps count.
        eps: size of the neighborhood.

    Returns:
        The parameters, and their metrics: `ratio_metrics`, f as `spi/step_fraction` (0 for old), and the index of the target
        as `spi/step_target` (`len(targets)` for old).
    """

    def candidate(tries):
        way, fraction = tries // TRIES, SHRINK ** (tries % TRIES)
        target = jax.tree.map(lambda *xs: jnp.stack(xs)[way], *targets)
        # exactly the target for f = 1, and exactly old if no target is left, even if a target is not finite
        move = lambda a, b: jnp.where(fraction == 1, b, a + fraction * (b - a))  # noqa: E731
        return jax.tree.map(lambda a, b: jnp.where(way == len(targets), a, move(a, b)), old, target)

    def leaves(carry):
        tries, _, found = carry
        return (tries < TRIES * len(targets)) & jnp.any(outside(found, eps))

    def next_try(carry):
        params = candidate(carry[0] + 1)
        return carry[0] + 1, params, log_ratios(params)

    first = jax.tree.map(jnp.asarray, targets[0])
    tries, params, found = jax.lax.while_loop(leaves, next_try, (jnp.zeros((), jnp.int32), first, log_ratios(first)))
    way = tries // TRIES
    metrics = {
        "spi/step_fraction": jnp.where(way == len(targets), 0.0, SHRINK ** (tries % TRIES)),
        "spi/step_target": way.astype(jnp.float32),
    }
    return params, ratio_metrics(found, valid, eps) | metrics


def gradient_steps(
    step: Callable[[Any, Any], tuple[Any, dict[str, Array]]], carry: Any, minibatches: Any, args: Any
) -> tuple[Any, dict[str, Float[Array, " K"]], Bool[Array, " K"]]:
    """Scan a gradient step over an update's K minibatches, and skip the rest if a flag stops the update early.

    `--target-kl` skips the minibatches after the first whose approximate KL divergence exceeds it. `early_stop` skips those
    after the first that finds a ratio outside the neighborhood (measured before its step), and discards that step too.

    Args:
        step: maps the carry (parameters and optimizer state) and a minibatch to the carry and metrics from before the step.
        carry, minibatches: as for `jax.lax.scan`.
        args: a script's flags.

    Returns:
        The final carry, the metrics of each minibatch, and which minibatches were not skipped.
    """
    early_stop = args.enforce_neighborhood == "early_stop"
    if args.target_kl is None and not early_stop:
        carry, metrics = scan_with_metrics(step, carry, minibatches)
        return carry, metrics, jnp.ones(jax.tree.leaves(minibatches)[0].shape[0], bool)

    def step_unless_stopped(carry, minibatch):
        carry, stopped = carry
        unmeasured = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, carry, minibatch)[1])
        stepped, metrics = jax.lax.cond(stopped, lambda carry, _: (carry, unmeasured), step, carry, minibatch)
        stop = stopped
        if args.target_kl is not None:
            stop = stop | (metrics["losses/approx_kl"] > args.target_kl)
        if early_stop:
            left = metrics["spi/outside_fraction"] > 0
            stepped, stop = jax.tree.map(lambda old, new: jnp.where(left, old, new), carry, stepped), stop | left
        return (stepped, stop), (metrics, ~stopped)

    (carry, _), (metrics, ran) = scan_with_metrics(step_unless_stopped, (carry, jnp.zeros((), bool)), minibatches)
    return carry, metrics, ran
