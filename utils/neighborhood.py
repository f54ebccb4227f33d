"""The neighborhood N^C of a policy, C = 1 + eps: all policies whose ratios to it lie in [2 - C, C] = [1 - eps, 1 + eps], for
*every* action. PPO's loss stops rewarding a ratio beyond it, and that of the action taken alone; it keeps no ratio inside."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from utils.losses import masked_mean
from utils.metrics import scan_with_metrics

Number = Float[Array, ""] | float

SHRINK = 0.7  # of the line search
TRIES = 12  # on the way to each target: down to 0.7^11 = 0.02


def outside(log_ratios: Float[Array, "*batch A"], eps: Number) -> Bool[Array, "*batch"]:
    """Whether the ratio of any action leaves [1 - eps, 1 + eps], or is not a number."""
    ratios = jnp.exp(log_ratios)
    return ~jnp.all((ratios >= 1 - eps) & (ratios <= 1 + eps), axis=-1)


def ratio_metrics(log_ratios: Float[Array, "*batch A"], valid: Bool[Array, "*batch"], eps: Number) -> dict[str, Array]:
    """The extreme ratios, and the share of states at which the policy has left the neighborhood.

    Args:
        log_ratios: of all actions at the states visited; 0 where a step is not valid.
        valid: which steps count.
        eps: the neighborhood.
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
    """Parameters on the way from the old ones to a target, as near to it as can be, that keep all ratios inside.

    Tries old + f (target - old) for f = 1, 0.7, 0.49, ..., on the way to each target in turn; where none will do, it is old
    itself. (TRPO's line search, Schulman et al., 2015, with N^C in the place of its constraint.) Jittable; each try costs one
    evaluation of the policy on all states.

    Args:
        old: parameters of the policy that the ratios are to, up to rounding.
        targets: where to go, first choice first.
        log_ratios: of all actions at the states visited, against the policy that visited them; 0 where a step is not valid.
        valid: which steps count.
        eps: the neighborhood.

    Returns:
        The parameters, and what to log: `ratio_metrics` of them, f as `spi/step_fraction` (0 for old), and
        `spi/step_target`, the index of the target (one more than the last for old).
    """

    def candidate(tries):
        way, fraction = tries // TRIES, SHRINK ** (tries % TRIES)
        target = jax.tree.map(lambda *xs: jnp.stack(xs)[way], *targets)
        # where f is 1 or 0 exactly the one or the other, were the target not even finite
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
    """Scans a gradient step over an update's K minibatches, and skips the rest of them where the flags ask for that.

    `--target-kl` skips what comes after the minibatch whose approximate KL divergence exceeds it. `early_stop` skips what comes
    after the minibatch that finds a ratio outside the neighborhood, and that one's own step: those before have gone too far.

    Args:
        step: takes the carry (what learns) and a minibatch, and returns the carry and metrics, measured before the step.
        carry, minibatches: as for `jax.lax.scan`.
        args: a script's flags.

    Returns:
        The last carry, the metrics of each minibatch, and which minibatches were not skipped.
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
