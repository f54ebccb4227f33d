"""The latent world model: transition P(z'|z, a) and reward R(z, a) of continuous latents.

Only the transition of the action taken is computed: each sample gathers its action's kernel, and one batched product does
the rest. Computing all A actions to select one would cost A times as much, in time and in memory.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from networks.architectures import ACTIVATIONS, dense
from networks.convolution import conv2d
from networks.lipschitz import (
    LipschitzConv,
    LipschitzDense,
    LipschitzScalars,
    group_sort,
    orthogonal,
    orthogonal_init,
    projection,
    shifting_kernel,
)
from utils.distributions import Deterministic, Normal, average_scale, soft_mixture

GROUPS = 16  # of the channels, in the last convolution of the transition
MIN_SCALE = 1e-6


def per_action_conv(
    x: Float[Array, "N H W C"], kernels: Float[Array, "A 2 2 G c o"], action: Int[Array, " N"]
) -> Float[Array, "N G o HW"]:
    """A grouped 2 x 2 convolution with SAME zero padding whose kernel is, for each sample, that of its action.

    Args:
        x: maps of C = c * G channels; channel k * G + g is the k-th of group g.
        kernels: one for each of the A actions.
        action: which of them a sample takes.

    Returns:
        maps with the channels first, the layout in which what follows is fast.
    """
    n, height, width, _ = x.shape
    num_actions, _, _, groups, c, o = kernels.shape
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    taps = [padded[:, i : i + height, j : j + width] for i in (0, 1) for j in (0, 1)]
    patches = jnp.stack(taps, axis=3).reshape(n, height * width, 4 * c, groups)
    kernels = kernels.transpose(0, 3, 5, 1, 2, 4).reshape(num_actions, -1)
    kernels = jax.lax.optimization_barrier(kernels)  # or XLA would compute them anew for every sample
    return _per_sample_product(kernels[action].reshape(n, groups, o, 4 * c), patches)


@jax.custom_vjp
def _per_sample_product(kernel: Float[Array, "N G o k"], patches: Float[Array, "N HW k G"]) -> Float[Array, "N G o HW"]:
    """A product of small matrices for each sample and group.

    XLA's CPU backend is fast for such batches in one layout, [.., m, k] @ [.., k, n], and several times slower in any other.
    So both this and its gradient make that layout, and barriers keep XLA from merging the transpositions into the products.
    """
    return kernel @ jax.lax.optimization_barrier(patches.transpose(0, 3, 2, 1))


def _per_sample_backward(residuals, g):
    kernel, patches = residuals
    kernel_t, by_pixel = jax.lax.optimization_barrier((kernel.swapaxes(-1, -2), patches.transpose(0, 3, 1, 2)))
    dkernel, dpatches = jax.lax.optimization_barrier((g @ by_pixel, kernel_t @ g))
    return dkernel, dpatches.transpose(0, 3, 2, 1)


_per_sample_product.defvjp(lambda k, x: (_per_sample_product(k, x), (k, x)), _per_sample_backward)


def as_latent(x: Float[Array, "N G o HW"], shape: tuple[int, ...]) -> Float[Array, "N H W C"]:
    """Channels last again, C = G * o."""
    # one more barrier: without it, XLA computes what made x, or its gradient, anew for every mixture component
    return jax.lax.optimization_barrier(x).transpose(0, 3, 1, 2).reshape(shape)


@jax.custom_jvp
def softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(1 + e^x), 1-Lipschitz. A third of the time of `jax.nn.softplus`, for an absolute error up to 1e-7."""
    return jnp.maximum(x, 0.0) + jnp.log(1.0 + jnp.exp(-jnp.abs(x)))


softplus.defjvps(lambda tangent, _, x: tangent * jax.nn.sigmoid(x))


class Transition(nn.Module):
    """The transition network: (z, a) -> distribution of z'.

    Two 2 x 2 convolutions; the second is grouped and has one kernel per action, which gives `components` locations and
    scales for each channel of z'.

    With `lipschitz`, a sample of z' with its noise fixed is a K-Lipschitz function of z, K = `lipschitz_constant`, for every
    action and every value of the parameters: the hidden map is 1-Lipschitz (certified convolution, GroupSort), and so is
    the map to each component's location and to the argument of its softplus. Half of K is given to the locations and half
    to the scales; noise is clipped to [-1, 1]. The mixture's weights depend on the action alone: weights that depend on
    z would multiply unbounded components by changing factors, and the map would not be Lipschitz at all. Averaging
    near-orthogonal maps is also how this network contracts where it should.
    """

    num_actions: int
    density: str = "mixture_normal"
    components: int = 5
    lipschitz: bool = True
    lipschitz_constant: float = 1.0
    activation: str = "relu"

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Deterministic | Normal:
        components = self.components if self.density == "mixture_normal" else 1
        maps = components if self.density == "deterministic" else 2 * components
        if self.lipschitz:
            return self._certified(z, action, components, maps)
        return self._unconstrained(z, action, components, maps)

    def _certified(self, z, action, components, maps):
        num_actions, channels = self.num_actions, z.shape[-1]
        hidden = group_sort(LipschitzConv(2 * channels, name="hidden")(z))

        c, o = 2 * channels // GROUPS, channels // GROUPS
        wide = max(c, o)
        h = self.param("dense", orthogonal_init, (c, o, num_actions, maps, GROUPS))
        p = self.param("vertical", orthogonal_init, (wide, wide // 2, num_actions, 1, GROUPS))
        q = self.param("horizontal", orthogonal_init, (wide, wide // 2, num_actions, 1, GROUPS))
        bias = self.param("bias", nn.initializers.zeros, (num_actions, GROUPS, maps, o))
        weights = jnp.ones((num_actions, 1))
        if components > 1:
            weights = nn.softmax(self.param("mixture", nn.initializers.zeros, (num_actions, components)))

        # the locations enter through their average alone, so their kernels are averaged before the convolution
        h, p, q = orthogonal(h), projection(p), projection(q)
        h = jnp.concatenate(
            [jnp.einsum("coamg,am->coag", h[..., :components, :], weights)[..., None, :], h[..., components:, :]],
            axis=3,
        )
        bias = jnp.concatenate(
            [jnp.einsum("agmo,am->ago", bias[:, :, :components], weights)[:, :, None], bias[:, :, components:]], axis=2
        )
        # one kernel of norm at most 1 per map; the maps share what is shifted
        kernels = shifting_kernel(h, p, q).transpose(4, 0, 1, 6, 2, 5, 3).reshape(num_actions, 2, 2, GROUPS, c, -1)
        raw = per_action_conv(hidden, kernels, action)
        raw = raw.reshape(*raw.shape[:2], -1, o, raw.shape[-1]) + bias[action][..., None]  # [N, G, maps, o, h * w]

        if self.density == "deterministic":
            return Deterministic(self.lipschitz_constant * as_latent(raw[:, :, 0], z.shape))
        loc, scales = jnp.split(raw, [1], axis=2)
        scale = average_scale(weights[action][:, None, :, None, None], softplus(scales) + MIN_SCALE, axis=2)
        half = 0.5 * self.lipschitz_constant
        return Normal(half * as_latent(loc[:, :, 0], z.shape), half * as_latent(scale, z.shape), noise_clip=1.0)

    def _unconstrained(self, z, action, components, maps):
        num_actions, channels = self.num_actions, z.shape[-1]
        init = nn.initializers.lecun_normal()
        kernel = self.param("hidden_kernel", init, (2, 2, channels, 2 * channels))
        bias = self.param("hidden_bias", nn.initializers.zeros, (2 * channels,))
        hidden = ACTIVATIONS[self.activation](conv2d(z, kernel, padding="SAME") + bias)

        c, o = 2 * channels // GROUPS, channels // GROUPS
        per_action = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(1, 2, 4), batch_axis=(0, 3))
        kernels = self.param("kernels", per_action, (num_actions, 2, 2, GROUPS, c, maps * o))
        bias = self.param("bias", nn.initializers.zeros, (num_actions, GROUPS, maps, o))
        raw = per_action_conv(hidden, kernels, action)
        raw = raw.reshape(*raw.shape[:2], maps, o, raw.shape[-1]) + bias[action][..., None]
        if self.density == "deterministic":
            return Deterministic(as_latent(raw[:, :, 0], z.shape))
        loc, scale = raw[:, :, :components], softplus(raw[:, :, components:]) + MIN_SCALE
        weights = jnp.ones(())
        if components > 1:
            logits = dense(num_actions * components, 0.01, name="mixture")(hidden.reshape(hidden.shape[0], -1))
            logits = jnp.take_along_axis(logits.reshape(-1, num_actions, components), action[:, None, None], 1)
            weights = nn.softmax(logits).reshape(-1, 1, components, 1, 1)
        average = soft_mixture(weights, loc, scale, axis=2)
        return jax.tree.map(lambda x: as_latent(x, z.shape), average)


class Reward(nn.Module):
    """The reward network: (z, a) -> expected reward. Two dense layers and one output for each action.

    With `lipschitz`, R(., a) is K-Lipschitz for every action a, K = `lipschitz_constant`.
    """

    num_actions: int
    lipschitz: bool = True
    lipschitz_constant: float = 1.0
    activation: str = "relu"
    features: int = 256

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Float[Array, " N"]:
        x = z.reshape(z.shape[0], -1)
        if self.lipschitz:
            x = group_sort(LipschitzDense(self.features)(x))
            x = group_sort(LipschitzDense(self.features)(x))
            rewards = self.lipschitz_constant * LipschitzScalars(self.num_actions)(x)
        else:
            x = ACTIVATIONS[self.activation](dense(self.features)(x))
            x = ACTIVATIONS[self.activation](dense(self.features)(x))
            rewards = dense(self.num_actions, 1.0)(x)
        return jnp.take_along_axis(rewards, action[:, None], axis=1)[:, 0]
