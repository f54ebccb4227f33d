"""Losses of the world model."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from utils.distributions import Categorical, Deterministic, Normal
from utils.losses import smooth_l1_loss


def transition_loss(
    predicted: Deterministic | Normal | Categorical, next_z: Float[Array, "N *z"], key: jax.Array, args: Any
) -> Float[Array, " N"]:
    """l_P of each transition: how far the predicted distribution of z' is from phi(o'), summed over the latent.

    Continuous latents: Huber's loss of a sample; for unconstrained normals the expected absolute error, in closed form.
    Categorical ones: see `CATEGORICAL_COSTS`.
    """
    if args.w_balancing is not None:
        predicted = jax.tree.map(partial(scale_gradient, factor=args.w_balancing), predicted)
        next_z = scale_gradient(next_z, 1.0 - args.w_balancing)
    if isinstance(predicted, Categorical):
        costs = CATEGORICAL_COSTS[args.categorical_cost].distance(predicted, next_z, key)
    elif isinstance(predicted, Normal) and predicted.noise_clip is None:
        costs = predicted.absolute_error(next_z)
    else:
        costs = smooth_l1_loss(predicted.sample(key) - next_z)
    return _sums(costs)


def scale_gradient(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """x itself, but what flows back through it is multiplied by `factor`."""
    stopped = jax.lax.stop_gradient(x)
    return stopped + factor * (x - stopped)


def l2(predicted: Categorical, next_z: Float[Array, "N V C"], key: jax.Array) -> Float[Array, "N V"]:
    """Squared distance of a sample."""
    return jnp.sum((predicted.sample(key) - next_z) ** 2, axis=-1)


def hamming(predicted: Categorical, next_z: Float[Array, "N V C"], key: jax.Array) -> Float[Array, "N V"]:
    """1 where a sample differs."""
    return 1.0 - jnp.sum(predicted.sample(key) * next_z, axis=-1)


def cross_entropy(predicted: Categorical, next_z: Float[Array, "N V C"], key: jax.Array) -> Float[Array, "N V"]:
    """Of the predicted probabilities; not random."""
    return -predicted.log_prob(next_z)


def jensen_shannon(predicted: Categorical, next_z: Float[Array, "N V C"], key: jax.Array) -> Float[Array, "N V"]:
    """Jensen-Shannon distance between the predicted probabilities and the code; not random."""
    return jensen_shannon_distance(predicted.mean(), next_z)


class Cost(NamedTuple):
    """A distance of the next code from the prediction."""

    distance: Callable[[Categorical, Float[Array, "N V C"], jax.Array], Float[Array, "N V"]]
    samples: bool  # whether it draws a sample of the prediction


CATEGORICAL_COSTS = {
    "l2": Cost(l2, samples=True),
    "hamming": Cost(hamming, samples=True),
    "cross_entropy": Cost(cross_entropy, samples=False),
    "jensen_shannon": Cost(jensen_shannon, samples=False),
}


def jensen_shannon_distance(
    p: Float[Array, "*batch C"], q: Float[Array, "*batch C"], eps: float = 1e-8
) -> Float[Array, "*batch"]:
    """Square root of the Jensen-Shannon divergence in nats: a metric, at most sqrt(log 2) (Endres & Schindelin, 2003).

    `eps` within the logarithms keeps gradients finite at probabilities of 0, where the slope of x log x is not; it changes the
    divergence by at most about C eps / 2.
    """
    middle = 0.5 * (p + q)
    divergence = 0.0
    for x in (p, q):
        divergence = divergence + 0.5 * jnp.sum(x * jnp.log((x + eps) / (middle + eps)), axis=-1)
    positive = divergence > 1e-12  # the root's gradient at 0 is infinite: both the argument and the result are replaced
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, divergence, 1.0)), 0.0)


def penalizes_gradients(args: Any) -> bool:
    """Whether the flags ask for a penalty on the world model's gradients."""
    return args.latent == "continuous" and not args.lipschitz_nets and args.lambda_gp > 0


def gradient_penalty(
    f: Callable[[Float[Array, "N *z"]], Any], z: Float[Array, "N *z"], key: jax.Array, wgan: bool
) -> Float[Array, " N"]:
    """How steep f is at each z, as a penalty: the squared norm of a gradient, or with `wgan` (norm - 1)^2.

    The gradient is that of f's output along a random unit vector v of its space, J^T v: one vector-Jacobian product, where
    the Jacobian would take one for each of 3136 numbers. Where f has more outputs than inputs, the square is multiplied by
    their ratio, so that its mean over v is the mean square of J's singular values, and an isometry scores 1. For a scalar f it
    is the gradient itself. f's output may be a distribution: for independent normals the Euclidean distance of (loc, scale)
    is the 2-Wasserstein distance. A penalty of this kind makes f flat on average; it bounds no Lipschitz constant.

    Source: Gulrajani et al., 2017 (equation 3), for `wgan`; Gelada et al., 2019 (DeepMDP), for its use in a world model.

    Args:
        f: maps each sample on its own; its output has the samples first.
        z: where; no gradient flows back to it, the penalty is about f.
        key: draws v.
        wgan: see above.
    """
    output, pull_back = jax.vjp(f, jax.lax.stop_gradient(z))
    leaves, tree = jax.tree.flatten(output)
    noise = [jax.random.normal(k, x.shape) for k, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)]
    length = jnp.sqrt(sum(_sums(x**2) for x in noise))
    direction = jax.tree.unflatten(tree, [x / length.reshape(-1, *(1,) * (x.ndim - 1)) for x in noise])
    outputs = sum(x[0].size for x in leaves)
    squared = max(1.0, outputs / z[0].size) * _sums(pull_back(direction)[0] ** 2)
    return (jnp.sqrt(squared + 1e-12) - 1.0) ** 2 if wgan else squared  # the gradient of a root at 0 is infinite


def _sums(x):  # of each sample
    return jnp.sum(x, axis=range(1, x.ndim))
