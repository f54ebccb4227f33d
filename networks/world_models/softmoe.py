"""World model of categorical latents with soft mixture-of-experts layers (Puigcerver et al., 2024).

Each variable of z is a token. Every slot of every expert reads a weighted average of all tokens (weights: a softmax over the
tokens). Every token gets a weighted average of all slots (a softmax over the slots). So no token is dropped, and everything
is differentiable. The action is added to each token.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from networks.architectures import ACTIVATIONS, Dense
from networks.world_models.fc import Reward
from networks.world_models.tokens import embed_variables, variable_logits
from utils.distributions import Categorical

__all__ = ["Reward", "Transition"]  # a scalar reward needs no tokens: its network is the fully connected one


class SoftMoE(nn.Module):
    """One layer: dispatch tokens to slots, apply one expert per group of slots, combine."""

    experts: int
    slots: int
    hidden: int
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "N V d"]) -> Float[Array, "N V d"]:
        width, init = x.shape[-1], nn.initializers.lecun_normal(batch_axis=0)
        routing = self.param("routing", nn.initializers.lecun_normal(), (width, self.experts * self.slots))
        up = self.param("up", init, (self.experts, width, self.hidden))
        down = self.param("down", init, (self.experts, self.hidden, width))
        affinity = (x @ routing).reshape(*x.shape[:2], self.experts, self.slots)
        slots = jnp.einsum("nved,nvw->endw", nn.softmax(affinity, axis=1), x)
        slots = jnp.einsum("endh,ehw->endw", ACTIVATIONS[self.activation](jnp.einsum("endw,ewh->endh", slots, up)), down)
        return jnp.einsum("nved,endw->nvw", nn.softmax(affinity, axis=(2, 3)), slots)


class Transition(nn.Module):
    """The transition network: (z, a) -> distribution of z'."""

    num_actions: int
    activation: str = "relu"
    temperature: float | None = None
    width: int = 128
    experts: int = 4
    slots: int = 8
    blocks: int = 2

    @nn.compact
    def __call__(self, z: Float[Array, "N V C"], action: Int[Array, " N"]) -> Categorical:
        x = embed_variables(self, z, self.width)
        x = x + Dense(self.width, name="embed_action")(nn.one_hot(action, self.num_actions))[:, None]
        for _ in range(self.blocks):
            x = x + SoftMoE(self.experts, self.slots, 4 * self.width, self.activation)(nn.LayerNorm()(x))
        return Categorical(variable_logits(self, nn.LayerNorm()(x), z.shape[2]), self.temperature)
