"""The latent world model: transition P(z'|z, a) and reward R(z, a) of continuous latents.

Only the transition of the action taken is computed: each sample gathers its action's kernels, and a few batched products do
the rest. Computing all A actions to select one would cost A times as much, in time and in memory.
"""

from functools import partial

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
)
from utils.distributions import Deterministic, Normal, average_scale, soft_mixture

GROUPS = 16  # of the channels, in the last convolution of the transition
MIN_SCALE = 1e-6


def by_group(x: Float[Array, "N h w C"]) -> Float[Array, "N G c hw"]:
    """Maps in groups, the pixels last: the layout in which products with a kernel of each sample's own are fast.

    Channel k * G + g is the k-th of group g, so that both of a pair that `group_sort` sorted are in the same group.
    """
    n, height, width, channels = x.shape
    return x.reshape(n, height * width, channels // GROUPS, GROUPS).transpose(0, 3, 2, 1)


def as_latent(x: Float[Array, "N G o hw"], shape: tuple[int, ...]) -> Float[Array, "N h w C"]:
    """Channels last again, C = G * o."""
    # the barrier keeps XLA from computing what made x, or its gradient, anew for every mixture component
    return jax.lax.optimization_barrier(x).transpose(0, 3, 1, 2).reshape(shape)


def shift(x: Float[Array, "N G c hw"], width: int, rows: int, cols: int) -> Float[Array, "N G c hw"]:
    """The maps moved up and to the left, zeros following."""
    pixels = rows * width + cols
    moved = jnp.pad(x[..., pixels:], ((0, 0), (0, 0), (0, 0), (0, pixels)))
    return jnp.where(jnp.arange(x.shape[-1]) % width < width - cols, moved, 0.0)


def of_action(table: Float[Array, "A *shape"], action: Int[Array, " N"]) -> Float[Array, "N *shape"]:
    """The entries of the actions. A product, whose gradient is the same on every run; that of indexing adds up in an order
    which a GPU does not keep."""
    taken = jax.nn.one_hot(action, table.shape[0], dtype=table.dtype)
    return jnp.matmul(taken, table.reshape(table.shape[0], -1), precision="highest").reshape(-1, *table.shape[1:])


@jax.custom_vjp
def product(
    kernels: Float[Array, "A G o c"], x: Float[Array, "N G c hw"], action: Int[Array, " N"]
) -> Float[Array, "N G o hw"]:
    """Each sample's maps, group by group, times the kernel of its action."""
    return kernels[action] @ x


def _product_backward(residuals, g):
    kernels, x, action = residuals
    # with the kernels transposed first, the product has the layout [m, k] @ [k, n], in which XLA's CPU backend is fast
    dx = kernels.swapaxes(-1, -2)[action] @ g
    (dkernels,) = jax.linear_transpose(partial(of_action, action=action), kernels)(jnp.einsum("ngop,ngcp->ngoc", g, x))
    return dkernels, dx, None


product.defvjp(lambda kernels, x, action: (product(kernels, x, action), (kernels, x, action)), _product_backward)


@jax.custom_jvp
def softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(1 + e^x), 1-Lipschitz. A third of the time of `jax.nn.softplus`, for an absolute error up to 1e-7."""
    # the barrier keeps XLA from computing it anew in the gradient, which needs only the result
    return jax.lax.optimization_barrier(jnp.maximum(x, 0.0) + jnp.log(1.0 + jnp.exp(-jnp.abs(x))))


softplus.defjvps(lambda tangent, softplus_x, _: tangent * (1.0 - jnp.exp(-softplus_x)))  # the sigmoid of x


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
        h = self.param("dense", orthogonal_init, (c, o, num_actions, maps, GROUPS))
        p = self.param("vertical", orthogonal_init, (c, c // 2, num_actions, GROUPS))
        q = self.param("horizontal", orthogonal_init, (c, c // 2, num_actions, GROUPS))
        bias = self.param("bias", nn.initializers.zeros, (num_actions, GROUPS, maps, o))
        weights = jnp.ones((num_actions, 1))
        if components > 1:
            weights = nn.softmax(self.param("mixture", nn.initializers.zeros, (num_actions, components)))

        h, p, q = orthogonal(h), projection(p), projection(q)
        h = h.transpose(2, 4, 3, 1, 0)  # [A, G, maps, o, c]
        p, q = p.transpose(2, 3, 0, 1), q.transpose(2, 3, 0, 1)  # [A, G, c, c], symmetric
        # the factors of `shifting_kernel` one after the other, each of norm at most 1; all maps share what is shifted
        x = by_group(hidden)
        x = x + product(q, shift(x, z.shape[2], 0, 1) - x, action)
        x = x + product(p, shift(x, z.shape[2], 1, 0) - x, action)

        # the locations enter through their average alone, so their kernels are averaged before the product
        average = partial(jnp.einsum, precision="highest")
        loc = product(average("agmoc,am->agoc", h[:, :, :components], weights), x, action)
        loc = loc + of_action(average("agmo,am->ago", bias[:, :, :components], weights), action)[..., None]
        if self.density == "deterministic":
            return Deterministic(self.lipschitz_constant * as_latent(loc, z.shape))
        scales = product(h[:, :, components:].reshape(num_actions, GROUPS, -1, c), x, action)
        scales = scales.reshape(*scales.shape[:2], components, o, -1) + of_action(bias[:, :, components:], action)[..., None]
        scale = average_scale(of_action(weights, action)[:, None, :, None, None], softplus(scales) + MIN_SCALE, axis=2)
        half = 0.5 * self.lipschitz_constant
        return Normal(half * as_latent(loc, z.shape), half * as_latent(scale, z.shape), noise_clip=1.0)

    def _unconstrained(self, z, action, components, maps):
        num_actions, channels = self.num_actions, z.shape[-1]
        init = nn.initializers.lecun_normal()
        kernel = self.param("hidden_kernel", init, (2, 2, channels, 2 * channels))
        bias = self.param("hidden_bias", nn.initializers.zeros, (2 * channels,))
        hidden = ACTIVATIONS[self.activation](conv2d(z, kernel, padding="SAME") + bias)

        c, o = 2 * channels // GROUPS, channels // GROUPS
        per_action = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(1, 2, 5), out_axis=4, batch_axis=(0, 3))
        kernels = self.param("kernels", per_action, (num_actions, 2, 2, GROUPS, maps * o, c))
        bias = self.param("bias", nn.initializers.zeros, (num_actions, GROUPS, maps, o))
        x = by_group(hidden)
        taps = [(i, j) for i in (0, 1) for j in (0, 1)]
        raw = sum(product(kernels[:, i, j], shift(x, z.shape[2], i, j), action) for i, j in taps)
        raw = raw.reshape(*raw.shape[:2], maps, o, raw.shape[-1]) + of_action(bias, action)[..., None]
        if self.density == "deterministic":
            return Deterministic(as_latent(raw[:, :, 0], z.shape))
        loc, scale = raw[:, :, :components], softplus(raw[:, :, components:]) + MIN_SCALE
        weights = jnp.ones((1, 1, 1, 1, 1))
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
