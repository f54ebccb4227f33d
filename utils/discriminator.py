"""The transition loss as a distance that a discriminator sees."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from networks.discriminator import TotalVariationCritic, WassersteinCritic
from utils.run import refuse_unread, require
from utils.world_model import transition_loss


@dataclass
class DiscriminatorArgs:
    """Flags of the discriminator."""

    wasserstein_discriminator: bool = False
    """measure the transition loss by a discriminator trained to tell real next latents from predicted ones: 1-Wasserstein
    distance for continuous latents, total variation for categorical ones. Both are far smaller than the usual sum over the
    latent, so that --transition-loss-coef wants to be larger"""
    discriminator_steps: int = 5
    """its gradient steps before each one of the world model"""
    discriminator_learning_rate: float = 2e-4
    """its learning rate (Adam), lowered as --anneal-lr says"""


def check_discriminator(args: Any) -> None:
    """Checks the flags of `DiscriminatorArgs`, given those of the script around them.

    Raises:
        UsageError: the first mistake found.
    """
    if not args.wasserstein_discriminator:
        return refuse_unread(args, ("discriminator_steps", "discriminator_learning_rate"), "--wasserstein-discriminator")
    # relaxed samples are never one-hot, as real codes are: all would be told apart, whatever the model
    unread = ("categorical_cost", "w_balancing", "use_gumbel_softmax")
    refuse_unread(args, unread, "the usual distances, without --wasserstein-discriminator")
    require(args.discriminator_steps > 0, f"--discriminator-steps {args.discriminator_steps}: must be at least 1")
    require(
        args.discriminator_learning_rate > 0,
        f"--discriminator-learning-rate {args.discriminator_learning_rate}: must be positive",
    )


def make_discriminator(args: Any, num_actions: int) -> nn.Module | None:
    """The discriminator that the flags ask for, if any."""
    if not args.wasserstein_discriminator:
        return None
    return WassersteinCritic(num_actions) if args.latent == "continuous" else TotalVariationCritic(num_actions, args.activation)


def transition_distance(
    discriminator: nn.Module | None, params: Any, z: Float[Array, "N *z"], action: Int[Array, " N"]
) -> Callable:
    """Measures how far predictions of what follows z and the action are from next latents, as `transition_loss` does. With a
    discriminator the mean over transitions is the distance, and single ones may be negative."""
    if discriminator is None:
        return transition_loss

    def distance(predicted, next_z, key, args):
        value = lambda z_after: discriminator.apply(params, z, action, z_after)  # noqa: E731
        return value(next_z) - value(predicted.sample(key))

    return distance
