"""Fully connected world model of categorical latents."""

import flax.linen as nn
from jaxtyping import Array, Float, Int

from networks.architectures import ACTIVATIONS, Dense
from utils.distributions import Categorical


class Torso(nn.Module):
    """Embed latent and action, add them, and apply one hidden layer."""

    num_actions: int
    activation: str = "relu"
    embedding: int = 128
    hidden: int = 512

    @nn.compact
    def __call__(self, z: Float[Array, "N V C"], action: Int[Array, " N"]) -> Float[Array, "N hidden"]:
        activation = ACTIVATIONS[self.activation]
        x = Dense(self.embedding, name="embed_z")(z.reshape(z.shape[0], -1))
        x = x + Dense(self.embedding, name="embed_action")(nn.one_hot(action, self.num_actions))
        return activation(Dense(self.hidden, name="hidden")(activation(x)))


class Transition(nn.Module):
    """The transition network: (z, a) -> distribution of z'."""

    num_actions: int
    activation: str = "relu"
    temperature: float | None = None

    @nn.compact
    def __call__(self, z: Float[Array, "N V C"], action: Int[Array, " N"]) -> Categorical:
        x = Torso(self.num_actions, self.activation, name="torso")(z, action)
        logits = Dense(z.shape[1] * z.shape[2], 1.0, name="logits")(x)
        return Categorical(logits.reshape(z.shape), self.temperature)


class Reward(nn.Module):
    """The reward network: (z, a) -> expected reward."""

    num_actions: int
    activation: str = "relu"

    @nn.compact
    def __call__(self, z: Float[Array, "N V C"], action: Int[Array, " N"]) -> Float[Array, " N"]:
        x = Torso(self.num_actions, self.activation, name="torso")(z, action)
        return Dense(1, 1.0, name="reward")(x)[:, 0]
