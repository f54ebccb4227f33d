"""Flags of the world model, and its losses."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from envs.registry import pays_beyond_one
from utils.distributions import SCALE, Categorical, Deterministic, Normal
from utils.losses import smooth_l1_loss
from utils.runs.flags import Count, Needs, NotNegative, Positive, Share, Sizes, as_typed, require

SAMPLED = ("l2", "hamming")  # costs of a sample
SCALED = ("normal", "mixture_normal")  # densities with a scale

CONTINUOUS = Needs("continuous latents", latent="continuous")
CODES = Needs(latent="categorical")
PENALISED = Needs(lipschitz_nets=False)
SAMPLES = Needs("a cost that samples: --categorical-cost l2 or hamming", categorical_cost=SAMPLED)
Density = Annotated[Literal["deterministic", "normal", "mixture_normal"], CONTINUOUS]


@dataclass
class WorldModelArgs:
    """Flags of the world model."""

    # of continuous latents
    transition_density: Density = "mixture_normal"
    """continuous latents: distribution of the next; mixture_normal is the soft mixture, a weighted average of normals"""
    mixture_components: Annotated[Count, CONTINUOUS, Needs(transition_density="mixture_normal")] = 5
    """components of mixture_normal"""
    initial_scale: Annotated[Positive, CONTINUOUS, Needs("a density with scales", transition_density=SCALED)] = SCALE
    """scale of each component at the start, of which Lipschitz networks take a tenth; one that starts small changes slowly"""
    lipschitz_nets: Annotated[bool, CONTINUOUS] = True
    """continuous latents: transition and reward networks that are K-Lipschitz for every value of their parameters; otherwise
    unconstrained ones, with a penalty on their gradients if --lambda-gp is above 0"""
    lipschitz_constant: Annotated[Positive, CONTINUOUS, Needs(lipschitz_nets=True)] = 1.0
    """K of the Lipschitz networks"""
    lambda_gp: Annotated[NotNegative, CONTINUOUS, PENALISED] = 0.01
    """weight of the gradient penalty of unconstrained networks; 0 for none"""
    use_wgan_gp: Annotated[bool, CONTINUOUS, PENALISED] = False
    """penalise (gradient norm - 1)^2, not its square: the networks are to have slopes near 1, and not to be flat"""
    transition_layers: Annotated[Sizes, CONTINUOUS] = ()
    """widths of the layers of a transition network that predicts by how much the latent changes (each even, for Lipschitz
    networks); with no number behind it, the paper's two layers"""
    # of categorical latents
    world_model: Annotated[Literal["fc", "transformer", "softmoe"], CODES] = "fc"
    """categorical latents: transition network"""
    categorical_cost: Annotated[Literal["l2", "cross_entropy", "hamming", "jensen_shannon"], CODES] = "l2"
    """categorical latents: distance of the next code from a sampled one (l2, hamming) or from its distribution (the others)"""
    use_gumbel_softmax: Annotated[bool, CODES, SAMPLES] = False
    """categorical latents: samples are one-hot with the gradient of the Gumbel-softmax instead of that of the probabilities"""
    gumbel_temperature: Annotated[Positive, CODES, SAMPLES, Needs(use_gumbel_softmax=True)] = 1.0
    """temperature of the Gumbel-softmax"""
    # of both
    w_balancing: Share | None = None
    """share of the transition loss's gradient that reaches the prediction, the rest going to the next latent (DreamerV2's
    balancing, with the distance at hand in the place of its KL divergence); by default each gets all of its own"""
    clip_reward_net_output: bool = False
    """squash the output of the reward network to [-1, 1]"""

    def check(self) -> None:
        """Raises UsageError where these flags do not go together, or not with those of the script around them."""
        require(
            self.lambda_gp > 0 or not self.use_wgan_gp,
            f"--lambda-gp {self.lambda_gp}: --use-wgan-gp is a penalty, and needs a weight above 0",
        )
        even = not self.lipschitz_nets or not any(size % 2 for size in self.transition_layers)
        require(even, f"{as_typed('transition_layers', self.transition_layers)}: Lipschitz networks need even widths")
        require(
            not self.clip_reward_net_output or self.reward_clip,
            "--clip-reward-net-output: cannot predict the rewards that --no-reward-clip lets through; drop one of the two",
        )
        require(
            not (self.clip_reward_net_output and pays_beyond_one(self.env_id)),
            f"--clip-reward-net-output: cannot predict the rewards of {self.env_id}; leave it out",
        )


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
    if args.latent == "categorical":
        costs = CATEGORICAL_COSTS[args.categorical_cost](predicted, next_z, key)
    elif args.lipschitz_nets or args.transition_density == "deterministic":
        costs = smooth_l1_loss(predicted.sample(key) - next_z)
    else:
        costs = predicted.absolute_error(next_z)
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


CATEGORICAL_COSTS: dict[str, Callable] = {
    "l2": l2, "hamming": hamming, "cross_entropy": cross_entropy, "jensen_shannon": jensen_shannon
}  # fmt: skip


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


def penalises_gradients(args: Any) -> bool:
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
