"""Transformer world model of categorical latents: the action, then the variables of z in order, one token each.

Attention is causal: the distribution of the v-th variable of z' depends on the action and the first v variables of z.
(Vaswani et al., 2017, with normalization before each sub-layer.)
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from networks.architectures import ACTIVATIONS, Dense
from networks.world_models.fc import Reward
from networks.world_models.tokens import embed_variables, variable_logits
from utils.distributions import Categorical

__all__ = ["Reward", "Transition"]  # a scalar reward needs no sequence: its network is the fully connected one


class Transition(nn.Module):
    """The transition network: (z, a) -> distribution of z'."""

    num_actions: int
    activation: str = "relu"
    temperature: float | None = None
    width: int = 128
    heads: int = 4
    blocks: int = 2

    @nn.compact
    def __call__(self, z: Float[Array, "N V C"], action: Int[Array, " N"]) -> Categorical:
        action_token = Dense(self.width, name="embed_action")(nn.one_hot(action, self.num_actions))
        x = jnp.concatenate([action_token[:, None], embed_variables(self, z, self.width)], axis=1)
        causal = nn.make_causal_mask(x[..., 0])
        for _ in range(self.blocks):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=causal)
            y = ACTIVATIONS[self.activation](Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + Dense(self.width)(y)
        return Categorical(variable_logits(self, nn.LayerNorm()(x[:, 1:]), z.shape[2]), self.temperature)
