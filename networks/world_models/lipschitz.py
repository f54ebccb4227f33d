"""The certified world model of continuous latents: transition and reward are K-Lipschitz for every parameter value.

Source: the paper's networks (two 2 x 2 convolutions; dense 256, 256), built from the layers of `networks/lipschitz.py`.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from networks.lipschitz import (
    LipschitzConv,
    LipschitzDense,
    LipschitzScalars,
    group_sort,
    mirror_init,
    orthogonal,
    orthogonal_init,
    projection,
    still_init,
)
from networks.per_action import applied, by_group, groups, of_action, shift
from utils.distributions import INITIAL_SCALE, Deterministic, Normal, average_scale, count_maps, initial_bias, positive_scale

SCALE_SHARE = 0.1  # fraction of K for the scales; the locations get the rest


def dense_init(key: jax.Array, shape: tuple[int, ...], components: int) -> Float[Array, "c o A maps G"]:
    """Return initial kernels. The first `components` maps (locations) turn the hidden (-z, z) back into z, plus noise that
    makes them differ. The maps of the scales are random."""
    eye = jnp.eye(shape[1])
    back = jnp.concatenate([-eye, eye]).reshape(*shape[:2], 1, 1, 1)
    noise = orthogonal_init(key, shape)
    return jnp.where(jnp.arange(shape[3])[:, None] < components, back + 0.1 * noise, noise)


class Transition(nn.Module):
    """The transition network: (z, a) -> distribution of z'.

    Two 2 x 2 convolutions; the second is grouped and has one kernel per action. It gives `components` locations and scales
    for each channel of z'.

    For fixed noise, a sample of z' is a K-Lipschitz function of z, K = `constant`, for every action and every parameter
    value. The hidden map is 1-Lipschitz (certified convolution, GroupSort). So is the map to each component's location and to
    the argument of its softplus. K is divided between locations and scales (`SCALE_SHARE`), and noise is clipped to [-1, 1].
    The mixture's weights depend only on the action: weights that depend on z would multiply unbounded components by varying
    factors, and the map would not be Lipschitz. Averaging near-orthogonal maps also lets this network contract where it should.

    Initially, z' is near 0.9 K z (K z without scales) if z >= 0, as after a relu; after other activations |z| replaces z.
    Consecutive frames differ little, so this is nearly right from the first step. A random map of nearly full norm would be
    worse than no prediction, and the encoder could then lower the loss most easily by giving up its features. Nothing is
    shifted at first. The noise on the location kernels gives the shifts a gradient; with an exact identity it would be 0.
    """

    num_actions: int
    density: str = "mixture_normal"
    components: int = 5
    initial_scale: float = INITIAL_SCALE
    constant: float = 1.0

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Deterministic | Normal:
        components, maps = count_maps(self.density, self.components)
        num_actions, channels = self.num_actions, z.shape[-1]
        hidden = group_sort(LipschitzConv(2 * channels, mirror_init, still_init, name="hidden")(z))

        g = groups(channels)
        c, o = 2 * channels // g, channels // g
        h = self.param("dense", partial(dense_init, components=components), (c, o, num_actions, maps, g))
        vector = z.shape[1:3] == (1, 1)  # a 1x1 map, where no shift applies
        shifted = [] if vector else ["vertical", "horizontal"]
        shifted = [self.param(name, still_init, (c, c // 2, num_actions, g)) for name in shifted]
        bias = self.param("bias", initial_bias, (num_actions, maps, channels), components, self.initial_scale)
        weights = jnp.ones((num_actions, 1))
        if components > 1:
            weights = nn.softmax(self.param("mixture", nn.initializers.zeros, (num_actions, components)))

        # all of them have one shape, c x c / 2, and form one batch
        kernels = orthogonal(jnp.concatenate([h, *(x[:, :, :, None] for x in shifted)], axis=3))
        h = kernels[:, :, :, :maps].transpose(2, 3, 1, 0, 4)  # [A, maps, o, c, G]
        taken = partial(of_action, action=action)
        # the factors of `shifting_kernel` in turn, each of norm at most 1; all maps share the shifts
        x = by_group(hidden)
        if not vector:
            p, q = projection(kernels[:, :, :, maps:]).transpose(3, 2, 0, 1, 4)  # [A, c, c, G] each, symmetric
            x = x + applied(q, action, shift(x, 0, 1) - x)
            x = x + applied(p, action, shift(x, 1, 0) - x)

        # only the average of the locations is used, so their kernels are averaged before the product
        average = partial(jnp.einsum, precision="highest")
        loc = applied(average("amocg,am->aocg", h[:, :components], weights), action, x)
        loc = loc.reshape(z.shape) + taken(average("amc,am->ac", bias[:, :components], weights))[:, None, None]
        if maps == components:  # no scales
            return Deterministic(self.constant * loc)
        scales = applied(h[:, components:].reshape(num_actions, -1, c, g), action, x)
        scales = scales.reshape(*z.shape[:3], components, channels) + taken(bias[:, components:])[:, None, None]
        scale = average_scale(taken(weights)[:, None, None, :, None], positive_scale(scales), axis=3)
        return Normal((1 - SCALE_SHARE) * self.constant * loc, SCALE_SHARE * self.constant * scale, 1.0)


class DeepTransition(nn.Module):
    """A transition network of several layers, K-Lipschitz like `Transition`.

    Certified convolutions of the given widths (dense layers if z is a 1x1 map), each with a bias per action, compute a
    1-Lipschitz change g of z. Then z' = a z + b g with max |a| + |b| <= K for every action, which is K-Lipschitz for all such a
    (one per channel) and b. Initially a = 1 and b = 0.1, both scaled down if K requires it. (With scales, K is divided as in
    `Transition`.)
    """

    num_actions: int
    density: str
    components: int
    initial_scale: float
    constant: float
    layers: Sequence[int]

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Deterministic | Normal:
        components, maps = count_maps(self.density, self.components)
        num_actions, channels = self.num_actions, z.shape[-1]
        of_each = lambda name, init, *shape: of_action(self.param(name, init, (num_actions, *shape)), action)  # noqa: E731

        x = z
        for k, features in enumerate(self.layers):
            bias = of_each(f"action_{k}", nn.initializers.normal(0.1), features)
            x = group_sort(LipschitzConv(features, name=f"layer_{k}")(x) + bias[:, None, None])
        x = jnp.stack([LipschitzConv(channels, name=f"map_{k}")(x) for k in range(maps)], axis=3)
        bias = partial(initial_bias, components=components, scale=self.initial_scale)
        x = x + of_each("bias", bias, maps, channels)[:, None, None]
        weights = jnp.ones((1, 1, 1, 1, 1))
        if components > 1:
            weights = nn.softmax(of_each("mixture", nn.initializers.zeros, components))[:, None, None, :, None]
        change = jnp.sum(weights * x[:, :, :, :components], axis=3)

        kept = of_each("kept", nn.initializers.ones, channels)
        changed = of_each("changed", nn.initializers.constant(0.1), 1)
        limit = self.constant * (1.0 if maps == components else 1.0 - SCALE_SHARE)
        steepest = jnp.max(jnp.abs(kept), axis=1, keepdims=True) + jnp.abs(changed)
        within = limit / jnp.maximum(steepest, limit)
        loc = (within * kept)[:, None, None] * z + (within * changed)[:, None, None] * change
        if maps == components:  # no scales
            return Deterministic(loc)
        scale = average_scale(weights, positive_scale(x[:, :, :, components:]), axis=3)
        return Normal(loc, SCALE_SHARE * self.constant * scale, 1.0)


class Reward(nn.Module):
    """The reward network: (z, a) -> expected reward, K-Lipschitz in z for every action, K = `constant`."""

    num_actions: int
    constant: float = 1.0
    features: int = 256

    @nn.compact
    def __call__(self, z: Float[Array, "N h w c"], action: Int[Array, " N"]) -> Float[Array, " N"]:
        x = z.reshape(z.shape[0], -1)
        features = min(self.features, x.shape[1])
        x = group_sort(LipschitzDense(features)(x))
        x = group_sort(LipschitzDense(features)(x))
        rewards = self.constant * LipschitzScalars(self.num_actions)(x)
        return jnp.take_along_axis(rewards, action[:, None], axis=1)[:, 0]
