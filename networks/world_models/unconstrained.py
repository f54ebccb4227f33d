"""The unconstrained world model of continuous latents: networks shaped like those of `lipschitz.py`.

Their Lipschitz constants are not bounded. An optional gradient penalty (`utils/world_model.py`) limits slopes only on average.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from networks.architectures import ACTIVATIONS, Dense
from networks.convolution import conv2d
from networks.per_action import applied, by_group, groups, of_action, shift
from utils.distributions import INITIAL_SCALE, Deterministic, Normal, count_maps, initial_bias, positive_scale, soft_mixture


class Transition(nn.Module):
    """The transition network: (z, a) -> distribution of z'. Its mixture weights depend on z and on the action."""

    num_actions: int
    density: str = "mixture_normal"
    components: int = 5
    initial_scale: float = INITIAL_SCALE
    activation: str = "relu"

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Deterministic | Normal:
        components, maps = count_maps(self.density, self.components)
        num_actions, channels = self.num_actions, z.shape[-1]
        init = nn.initializers.lecun_normal()
        taps = 1 if z.shape[1:3] == (1, 1) else 2  # a 1x1 map has no neighboring pixels
        kernel = self.param("hidden_kernel", init, (taps, taps, channels, 2 * channels))
        bias = self.param("hidden_bias", nn.initializers.zeros, (2 * channels,))
        hidden = ACTIVATIONS[self.activation](convolved(z, kernel) + bias)

        g = groups(channels)
        c, o = 2 * channels // g, channels // g
        per_action = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=2, out_axis=1, batch_axis=(0, 3))
        kernels = self.param("kernels", per_action, (num_actions, maps * o, taps**2 * c, g))
        bias = self.param("bias", initial_bias, (num_actions, maps, channels), components, self.initial_scale)
        x = by_group(hidden)
        x = jnp.concatenate([shift(x, i, j) for i in range(taps) for j in range(taps)], axis=3)
        raw = applied(kernels, action, x)
        raw = raw.reshape(*z.shape[:3], maps, channels) + of_action(bias, action)[:, None, None]
        if maps == components:  # no scales
            return Deterministic(raw.reshape(z.shape))
        loc, scale = raw[:, :, :, :components], positive_scale(raw[:, :, :, components:])
        weights = jnp.ones((1, 1, 1, 1, 1))
        if components > 1:
            logits = Dense(num_actions * components, 0.01, name="mixture")(hidden.reshape(hidden.shape[0], -1))
            logits = jnp.take_along_axis(logits.reshape(-1, num_actions, components), action[:, None, None], 1)
            weights = nn.softmax(logits).reshape(-1, 1, 1, components, 1)
        return soft_mixture(weights, loc, scale, axis=3)


class DeepTransition(nn.Module):
    """A transition network of several layers: 3 x 3 convolutions of the given widths (dense layers if z is a 1x1 map), each
    with a bias per action. The last layer gives the change of z, small at first, because consecutive frames differ little."""

    num_actions: int
    density: str
    components: int
    initial_scale: float
    activation: str
    layers: Sequence[int]

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Deterministic | Normal:
        components, maps = count_maps(self.density, self.components)
        taps = 1 if z.shape[1:3] == (1, 1) else 3
        hidden, one_hot = z, nn.one_hot(action, self.num_actions)
        for k, features in enumerate(self.layers):
            shape = (taps, taps, hidden.shape[-1], features)
            kernel = self.param(f"kernel_{k}", nn.initializers.orthogonal(np.sqrt(2)), shape)
            of_the_action = Dense(features, name=f"action_{k}")(one_hot)[:, None, None]
            hidden = ACTIVATIONS[self.activation](convolved(hidden, kernel) + of_the_action)
        raw = Dense(maps * z.shape[-1], 0.1, name="change")(hidden).reshape(*z.shape[:3], maps, -1)
        raw = raw + self.param("bias", initial_bias, (1, maps, z.shape[-1]), components, self.initial_scale)
        loc = z[:, :, :, None] + raw[:, :, :, :components]
        if maps == components:  # no scales
            return Deterministic(loc[:, :, :, 0])
        weights = jnp.ones((1, 1, 1, 1, 1))
        if components > 1:
            logits = Dense(components, 0.01, name="mixture")(hidden.reshape(hidden.shape[0], -1))
            weights = nn.softmax(logits).reshape(-1, 1, 1, components, 1)
        return soft_mixture(weights, loc, positive_scale(raw[:, :, :, components:]), axis=3)


def convolved(x: Float[Array, "N h w c"], kernel: Float[Array, "k k c o"]) -> Float[Array, "N h w o"]:
    """Convolve the map with the kernel; the size stays the same."""
    return x @ kernel[0, 0] if kernel.shape[:2] == (1, 1) else conv2d(x, kernel, padding="SAME")


class Reward(nn.Module):
    """The reward network: (z, a) -> expected reward."""

    num_actions: int
    activation: str = "relu"
    features: int = 256

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Float[Array, " N"]:
        x = z.reshape(z.shape[0], -1)
        x = ACTIVATIONS[self.activation](Dense(self.features)(x))
        x = ACTIVATIONS[self.activation](Dense(self.features)(x))
        rewards = Dense(self.num_actions, 1.0)(x)
        return jnp.take_along_axis(rewards, action[:, None], axis=1)[:, 0]
