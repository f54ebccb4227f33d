"""The unconstrained world model of continuous latents: the networks of `lipschitz.py` with plain layers.

Nothing bounds their Lipschitz constants but, where asked for, a penalty on their gradients (`utils/world_model.py`).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from networks.architectures import ACTIVATIONS, dense
from networks.convolution import conv2d
from networks.per_action import by_group, groups, of_action, product, shift
from utils.distributions import Deterministic, Normal, positive_scale, soft_mixture


class Transition(nn.Module):
    """The transition network: (z, a) -> distribution of z'. The weights of its mixture depend on z as well as on the action."""

    num_actions: int
    density: str = "mixture_normal"
    components: int = 5
    activation: str = "relu"

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Deterministic | Normal:
        components = self.components if self.density == "mixture_normal" else 1
        maps = components if self.density == "deterministic" else 2 * components
        num_actions, channels = self.num_actions, z.shape[-1]
        init = nn.initializers.lecun_normal()
        taps = 1 if z.shape[1:3] == (1, 1) else 2  # kernels of a vector see it alone
        kernel = self.param("hidden_kernel", init, (taps, taps, channels, 2 * channels))
        bias = self.param("hidden_bias", nn.initializers.zeros, (2 * channels,))
        hidden = z @ kernel[0, 0] if taps == 1 else conv2d(z, kernel, padding="SAME")
        hidden = ACTIVATIONS[self.activation](hidden + bias)

        g = groups(channels)
        c, o = 2 * channels // g, channels // g
        per_action = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=2, out_axis=1, batch_axis=(0, 3))
        kernels = self.param("kernels", per_action, (num_actions, maps * o, taps**2 * c, g))
        bias = self.param("bias", nn.initializers.zeros, (num_actions, maps, channels))
        x = by_group(hidden)
        x = jnp.concatenate([shift(x, i, j) for i in range(taps) for j in range(taps)], axis=3)
        raw = product(of_action(kernels, action), x)
        raw = raw.reshape(*z.shape[:3], maps, channels) + of_action(bias, action)[:, None, None]
        if self.density == "deterministic":
            return Deterministic(raw.reshape(z.shape))
        loc, scale = raw[:, :, :, :components], positive_scale(raw[:, :, :, components:])
        weights = jnp.ones((1, 1, 1, 1, 1))
        if components > 1:
            logits = dense(num_actions * components, 0.01, name="mixture")(hidden.reshape(hidden.shape[0], -1))
            logits = jnp.take_along_axis(logits.reshape(-1, num_actions, components), action[:, None, None], 1)
            weights = nn.softmax(logits).reshape(-1, 1, 1, components, 1)
        return soft_mixture(weights, loc, scale, axis=3)


class Reward(nn.Module):
    """The reward network: (z, a) -> expected reward."""

    num_actions: int
    activation: str = "relu"
    features: int = 256

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Float[Array, " N"]:
        x = z.reshape(z.shape[0], -1)
        x = ACTIVATIONS[self.activation](dense(self.features)(x))
        x = ACTIVATIONS[self.activation](dense(self.features)(x))
        rewards = dense(self.num_actions, 1.0)(x)
        return jnp.take_along_axis(rewards, action[:, None], axis=1)[:, 0]
