"""Critics f(z, a, z') that score next latents. The largest mean gap between real and predicted ones is a distance."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from networks.architectures import ACTIVATIONS, Dense
from networks.lipschitz import LipschitzDense, LipschitzScalars, group_sort


class WassersteinCritic(nn.Module):
    """For continuous latents: 1-Lipschitz in z' for each (z, a) and every parameter value.

    Over all 1-Lipschitz functions, the largest mean of f(z, a, z') - f(z, a, z'') is the mean over (z, a) of the 1-Wasserstein
    distance between z' and z'' (Kantorovich and Rubinstein). Over these networks it is a lower bound. The layer that adds z is
    unconstrained: what it adds is the same for all z'.
    """

    num_actions: int
    features: int = 256

    @nn.compact
    def __call__(
        self, z: Float[Array, "N h w c"], action: Int[Array, " N"], next_z: Float[Array, "N h w c"]
    ) -> Float[Array, " N"]:
        flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
        x = group_sort(LipschitzDense(self.features)(flat(next_z)) + Dense(self.features, name="condition")(flat(z)))
        x = group_sort(LipschitzDense(self.features)(x))
        return jnp.take_along_axis(LipschitzScalars(self.num_actions)(x), action[:, None], axis=1)[:, 0]


class TotalVariationCritic(nn.Module):
    """For categorical latents: values in [0, 1] for every parameter value.

    Over all functions with such values, the largest mean of f(z, a, z') - f(z, a, z'') is the mean over (z, a) of the total
    variation distance between z' and z''. Over these networks it is a lower bound.
    """

    num_actions: int
    activation: str = "relu"
    features: int = 256

    @nn.compact
    def __call__(self, z: Float[Array, "N V C"], action: Int[Array, " N"], next_z: Float[Array, "N V C"]) -> Float[Array, " N"]:
        x = jnp.concatenate([z.reshape(z.shape[0], -1), next_z.reshape(z.shape[0], -1)], axis=1)
        for _ in range(2):
            x = ACTIVATIONS[self.activation](Dense(self.features)(x))
        logits = Dense(self.num_actions, 1.0, name="logits")(x)
        return nn.sigmoid(jnp.take_along_axis(logits, action[:, None], axis=1)[:, 0])


def make_discriminator(args: Any, num_actions: int) -> nn.Module | None:
    """Create the discriminator that the flags describe, or return None without `--wasserstein-discriminator`."""
    if not args.wasserstein_discriminator:
        return None
    return WassersteinCritic(num_actions) if args.latent == "continuous" else TotalVariationCritic(num_actions, args.activation)
