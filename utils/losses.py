"""Elementary losses and reductions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real


def smooth_l1_loss(error: Float[Array, "*shape"], beta: float = 1.0) -> Float[Array, "*shape"]:
    """Huber's loss per element, scaled as in Fast R-CNN (Girshick, 2015): e^2 / (2 beta) below beta, |e| - beta / 2 above.

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


_huber.defjvps(lambda tangent, _, error: tangent * jnp.clip(error, -1.0, 1.0))  # one pass, where differentiation makes four


def masked_mean(x: Real[Array, "*shape"], valid: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """The mean of x where `valid`; 0 where nothing is. What is masked reaches neither the value nor the gradient."""
    return jnp.sum(jnp.where(valid, x, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def masked_normalize(x: Float[Array, "*shape"], valid: Bool[Array, "*shape"], eps: float = 1e-8) -> Float[Array, "*shape"]:
    """x less its mean, over its standard deviation, both taken where `valid`."""
    mean = masked_mean(x, valid)
    return (x - mean) / (jnp.sqrt(masked_mean((x - mean) ** 2, valid)) + eps)


def weighted_mean(x: Float[Array, "*shape"], weight: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The mean of x, each counting by its weight of 0 or more; 0 where none has any."""
    return jnp.sum(weight * x) / jnp.maximum(jnp.sum(weight), 1e-8)


def weighted_quantiles(
    x: Float[Array, "*shape"], weight: Float[Array, "*shape"], shares: tuple[float, ...]
) -> Float[Array, " q"]:
    """The smallest x below or at which lies that share of all weight, for each of the shares; nothing that has no weight."""
    order = jnp.argsort(x, axis=None)
    x, reached = x.reshape(-1)[order], jnp.cumsum(weight.reshape(-1)[order])
    return x[jnp.searchsorted(reached, jnp.asarray(shares) * reached[-1])]


def decayed_sums(x: Float[Array, "T N"], decay: Float[Array, "T N"]) -> Float[Array, "T N"]:
    """y[t] = x[t] + decay[t] y[t + 1], and y[T] = 0."""

    def backwards(later, step):
        total = step[0] + step[1] * later
        return total, total

    # each round of a loop is some kernels on a GPU, however little it does
    return jax.lax.scan(backwards, jnp.zeros_like(x[0]), (x, decay), reverse=True, unroll=8)[1]
