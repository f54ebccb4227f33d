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
    """Return the transition loss l_P of each transition: the cost of the predicted z' against phi(o'), summed over the latent.

    Continuous latents: Huber's loss of a sample. For normals with unclipped noise: the expected absolute error, in closed form.
    Categorical latents: see `CATEGORICAL_COSTS`.
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
    """Return x, with its gradient multiplied by `factor`."""
    if factor == 1.0:
        return x
    stopped = jax.lax.stop_gradient(x)
    return stopped + factor * (x - stopped)


def l2(predicted: Categorical, next_z: Float[Array, "N V C"], key: jax.Array) -> Float[Array, "N V"]:
    """Return the squared Euclidean distance of a sample from z'."""
    return jnp.sum((predicted.sample(key) - next_z) ** 2, axis=-1)


def hamming(predicted: Categorical, next_z: Float[Array, "N V C"], key: jax.Array) -> Float[Array, "N V"]:
    """Return 1 for each variable in which a sample differs from z', else 0."""
    return 1.0 - jnp.sum(predicted.sample(key) * next_z, axis=-1)


def cross_entropy(predicted: Categorical, next_z: Float[Array, "N V C"], key: jax.Array) -> Float[Array, "N V"]:
    """Return the cross-entropy of the predicted probabilities. The key is not used."""
    return -predicted.log_prob(next_z)


def jensen_shannon(predicted: Categorical, next_z: Float[Array, "N V C"], key: jax.Array) -> Float[Array, "N V"]:
    """Return the Jensen-Shannon distance between the predicted probabilities and z'. The key is not used."""
    return jensen_shannon_distance(predicted.mean(), next_z)


class Cost(NamedTuple):
    """A distance between the prediction and the next categorical latent."""

    distance: Callable[[Categorical, Float[Array, "N V C"], jax.Array], Float[Array, "N V"]]
    samples: bool  # whether it samples from the prediction


CATEGORICAL_COSTS = {
    "l2": Cost(l2, samples=True),
    "hamming": Cost(hamming, samples=True),
    "cross_entropy": Cost(cross_entropy, samples=False),
    "jensen_shannon": Cost(jensen_shannon, samples=False),
}


def jensen_shannon_distance(
    p: Float[Array, "*batch C"], q: Float[Array, "*batch C"], eps: float = 1e-8
) -> Float[Array, "*batch"]:
    """Return the root of the Jensen-Shannon divergence in nats: a metric, at most sqrt(log 2) (Endres & Schindelin, 2003).

    `eps` inside the logarithms keeps gradients finite at probability 0, where the slope of x log x is infinite. It changes the
    divergence by at most about C eps / 2.
    """
    middle = 0.5 * (p + q)
    divergence = 0.0
    for x in (p, q):
        divergence = divergence + 0.5 * jnp.sum(x * jnp.log((x + eps) / (middle + eps)), axis=-1)
    positive = divergence > 1e-12  # at 0 the root's gradient is infinite: replace argument and result
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, divergence, 1.0)), 0.0)


def penalizes_gradients(args: Any) -> bool:
    """Return True if the flags select a gradient penalty on the world model."""
    return args.latent == "continuous" and not args.lipschitz_nets and args.lambda_gp > 0


def gradient_penalty(
    f: Callable[[Float[Array, "N *z"]], Any], z: Float[Array, "N *z"], key: jax.Array, wgan: bool
) -> Float[Array, " N"]:
    """Return a penalty on the slope of f at each z: the squared norm of a gradient, or (norm - 1)^2 with `wgan`.

    The gradient is J^T v for f's Jacobian J and a random unit vector v of its output space. That is one vector-Jacobian
    product; all of J would take one per output, such as the 3136 elements of a feature map. If f has more outputs than inputs,
    the squared norm is multiplied by their ratio. Its mean over v is then the mean square of J's singular values, which is 1
    for an isometry. For a scalar f, J^T v is the gradient itself. f may return a distribution: for independent normals, the
    Euclidean distance of (loc, scale) is the 2-Wasserstein distance. The penalty bounds no Lipschitz constant.

    Source: Gulrajani et al., 2017 (equation 3), for `wgan`; Gelada et al., 2019 (DeepMDP), for its use in a world model.

    Args:
        f: maps each sample independently; samples are the first axis of its output.
        z: points at which to evaluate the slope. No gradient flows to z.
        key: draws v.
        wgan: penalize (norm - 1)^2.
    """
    output, pull_back = jax.vjp(f, jax.lax.stop_gradient(z))
    leaves, tree = jax.tree.flatten(output)
    noise = [jax.random.normal(k, x.shape) for k, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)]
    length = jnp.sqrt(sum(_sums(x**2) for x in noise))
    direction = jax.tree.unflatten(tree, [x / length.reshape(-1, *(1,) * (x.ndim - 1)) for x in noise])
    outputs = sum(x[0].size for x in leaves)
    squared = max(1.0, outputs / z[0].size) * _sums(pull_back(direction)[0] ** 2)
    return (jnp.sqrt(squared + 1e-12) - 1.0) ** 2 if wgan else squared  # a root has an infinite gradient at 0


def _sums(x):  # per sample
    return jnp.sum(x, axis=range(1, x.ndim))
