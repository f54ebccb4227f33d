"""A transition loss that a discriminator measures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from utils.dreams.optimizers import Optimizers, descend
from utils.losses import masked_mean
from utils.runs.flag_types import Count, Needs, Positive
from utils.runs.flags import refuse_unread
from utils.world_model import transition_loss

WANTED = Needs(wasserstein_discriminator=True)


@dataclass
class DiscriminatorArgs:
    """Flags of the discriminator."""

    wasserstein_discriminator: bool = False
    """measure the transition loss with a discriminator, trained to tell real next latents from predicted ones: 1-Wasserstein
    distance for continuous latents, total variation for categorical ones. Both are far smaller than the usual sum over the
    latent, so use a larger --transition-loss-coef"""
    discriminator_steps: Annotated[Count, WANTED] = 5
    """gradient steps of the discriminator before each gradient step of the world model"""
    discriminator_learning_rate: Annotated[Positive, WANTED] = 2e-4
    """learning rate of the discriminator (Adam), annealed with --anneal-lr"""

    def check(self) -> None:
        """Raise UsageError if a flag of the replaced distances is set."""
        if self.wasserstein_discriminator:
            refuse_unread(self, ("categorical_cost", "w_balancing"), "--no-wasserstein-discriminator")


def transition_distance(
    discriminator: nn.Module | None, params: Any, z: Float[Array, "N *z"], action: Int[Array, " N"]
) -> Callable:
    """Return a function like `transition_loss` that measures how far predictions from z and the action are from next latents.
    With a discriminator, only the mean over transitions is a distance; single values may be negative."""
    if discriminator is None:
        return transition_loss

    def distance(predicted, next_z, key, args):
        value = lambda z_after: discriminator.apply(params, z, action, z_after)  # noqa: E731
        return value(next_z) - value(predicted.sample(key))

    return distance


def update_discriminator(
    params: Any, opt_state: Optimizers, batch: Any, key: jax.Array, agent: Any, optimizers: Optimizers, rates: Optimizers,
    args: Any,
) -> tuple[Any, Optimizers]:  # fmt: skip
    """Train the discriminator on a script's minibatch to maximize the distance that it measures. Return the new parameters and
    optimizer states."""
    n = batch.action.shape[0]
    z = agent.encoder.apply(params.encoder, batch.obs)
    predicted = agent.transition.apply(params.transition, z[:n], batch.action)

    def loss(params, key):
        distance = transition_distance(agent.discriminator, params.discriminator, z[:n], batch.action)
        return -masked_mean(distance(predicted, z[-n:], key, args), batch.valid & ~batch.unseen_end)

    def step(carry, key):
        return descend("discriminator", jax.grad(loss)(carry[0], key), rates, *carry, optimizers), None

    return jax.lax.scan(step, (params, opt_state), jax.random.split(key, args.discriminator_steps))[0]
