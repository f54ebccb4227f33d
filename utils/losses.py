"""Elementary losses and reductions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real


def smooth_l1_loss(error: Float[Array, "*shape"], beta: float = 1.0) -> Float[Array, "*shape"]:
    """Return Huber's loss as in Fast R-CNN (Girshick, 2015): e^2 / (2 beta) where |e| < beta, |e| - beta / 2 elsewhere.

    Raises:
        ValueError: beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, not {beta}")
    return beta * _huber(error / beta)


@jax.custom_jvp
def _huber(error):
    size = jnp.abs(error)
    clipped = jnp.minimum(size, 1.0)
    return clipped * (size - 0.5 * clipped)


_huber.defjvps(lambda tangent, _, error: tangent * jnp.clip(error, -1.0, 1.0))  # one pass; automatic differentiation makes four


def masked_mean(x: Real[Array, "*shape"], valid: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Return the mean of x where `valid`, or 0 if nothing is. Masked elements affect neither the value nor the gradient."""
    return jnp.sum(jnp.where(valid, x, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def masked_normalize(x: Float[Array, "*shape"], valid: Bool[Array, "*shape"], eps: float = 1e-8) -> Float[Array, "*shape"]:
    """Subtract the mean of x and divide by its standard deviation, both computed where `valid`."""
    mean = masked_mean(x, valid)
    return (x - mean) / (jnp.sqrt(masked_mean((x - mean) ** 2, valid)) + eps)


def weighted_mean(x: Float[Array, "*shape"], weight: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Return the mean of x with nonnegative weights, or 0 if all weights are 0."""
    return jnp.sum(weight * x) / jnp.maximum(jnp.sum(weight), 1e-8)


def weighted_quantiles(
    x: Float[Array, "*shape"], weight: Float[Array, "*shape"], shares: tuple[float, ...]
) -> Float[Array, " q"]:
    """Return, for each fraction in `shares`, the smallest x where the cumulative weight reaches that fraction of the total."""
    order = jnp.argsort(x, axis=None)
    x, reached = x.reshape(-1)[order], jnp.cumsum(weight.reshape(-1)[order])
    return x[jnp.searchsorted(reached, jnp.asarray(shares) * reached[-1])]


def decayed_sums(x: Float[Array, "T N"], decay: Float[Array, "T N"]) -> Float[Array, "T N"]:
    """Return y with y[t] = x[t] + decay[t] y[t + 1] and y[T] = 0."""

    def backwards(later, step):
        total = step[0] + step[1] * later
        return total, total

    # unrolled, because on a GPU each loop iteration launches kernels however little it does
    return jax.lax.scan(backwards, jnp.zeros_like(x[0]), (x, decay), reverse=True, unroll=8)[1]
