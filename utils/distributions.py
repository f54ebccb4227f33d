"""Distributions of latents: continuous (a point mass, a normal, a soft mixture of normals) and categorical."""

import math
from functools import partial, reduce
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@flax.struct.dataclass
class Deterministic:
    """A point mass. It has no density, so there is no `log_prob`."""

    loc: Float[Array, "*shape"]

    def sample(self, key: jax.Array) -> Float[Array, "*shape"]:
        """Return the point. The key is not used."""
        return self.loc

    def mean(self) -> Float[Array, "*shape"]:
        """Return the point."""
        return self.loc


MIN_SCALE = 1e-6  # lower bound of a normal's scale
INITIAL_SCALE = math.log(2)  # softplus(0)


def clipped_normal(key: jax.Array, shape: tuple[int, ...], bound: float) -> Float[Array, "*shape"]:
    """Draw standard normal noise clipped to [-bound, bound], from 16 random bits per element instead of 32."""
    size = math.prod(shape)
    bits = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    halves = jnp.concatenate([bits & 0xFFFF, bits >> 16])[:size].reshape(shape)
    uniform = (halves.astype(jnp.float32) + 0.5) / 2**15 - 1.0  # midpoints of 2^16 intervals, for symmetric noise
    return jnp.clip(math.sqrt(2) * jax.lax.erf_inv(uniform), -bound, bound)


@flax.struct.dataclass
class Normal:
    """Independent normals. With `noise_clip` c, the standard noise of a sample is clipped to [-c, c].

    The clip makes a sample Lipschitz in (loc, scale): |dz'| <= |dloc| + c |dscale| for any fixed noise.
    """

    loc: Float[Array, "*shape"]
    scale: Float[Array, "*shape"]
    noise_clip: float | None = flax.struct.field(pytree_node=False, default=None)

    def sample(self, key: jax.Array) -> Float[Array, "*shape"]:
        """Draw a reparameterized sample (gradients reach loc and scale)."""
        if self.noise_clip is None:
            noise = jax.random.normal(key, self.loc.shape, self.loc.dtype)
        else:
            noise = clipped_normal(key, self.loc.shape, self.noise_clip)
        # drawing noise is expensive; without the barrier, XLA repeats it wherever the noise is used
        noise = jax.lax.optimization_barrier(noise)
        return self.loc + self.scale * noise

    def mean(self) -> Float[Array, "*shape"]:
        """Return the expectation: `loc`, also with the clip, which is symmetric."""
        return self.loc

    def log_prob(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Return the log-density per element.

        Raises:
            ValueError: the noise is clipped. A clipped distribution has atoms, so it has no density.
        """
        if self.noise_clip is not None:
            raise ValueError("noise_clip: a normal with clipped noise has no density; set noise_clip=None, or draw samples")
        return -0.5 * ((x - self.loc) / self.scale) ** 2 - jnp.log(self.scale) - 0.5 * jnp.log(2 * jnp.pi)

    def absolute_error(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Return E|X - x| per element in closed form: the mean of a folded normal (Leone et al., 1961).

        This is the 1-Wasserstein distance between the normal and the point x.

        Raises:
            ValueError: the noise is clipped.
        """
        if self.noise_clip is not None:
            raise ValueError("noise_clip: the closed form holds only for unclipped noise; set noise_clip=None, or draw samples")
        error = (x - self.loc) / self.scale
        return self.scale * (math.sqrt(2 / math.pi) * jnp.exp(-0.5 * error**2) + error * jax.lax.erf(error / math.sqrt(2)))


# log(1 + u) / u for u in [0, 1], lowest degree first: interpolated at Chebyshev points, error 2e-7
LOG_COEFFICIENTS = (
    0.99999978, -0.49997175, 0.33271928, -0.24474774, 0.17687477, -0.10685003, 0.04349390, -0.00837115
)  # fmt: skip


@jax.custom_jvp
def positive_scale(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return softplus(x) + `MIN_SCALE`, where softplus(x) = log(1 + e^x). It is 1-Lipschitz.

    A polynomial replaces the logarithm, which takes most of the time of `jax.nn.softplus`.
    """
    u = jnp.exp(-jnp.abs(x))
    log_over_u = reduce(lambda value, coefficient: value * u + coefficient, reversed(LOG_COEFFICIENTS))
    # the gradient needs only the result; without the barrier, XLA computes it again there
    return jax.lax.optimization_barrier(jnp.maximum(x, 0.0) + u * log_over_u + MIN_SCALE)


positive_scale.defjvps(lambda tangent, scale, _: tangent * (1.0 - jnp.exp(MIN_SCALE - scale)))  # sigmoid(x)


class Density(NamedTuple):
    """A family of transition distributions: whether its components have scales, and whether it has several components."""

    has_scale: bool
    is_mixture: bool


DENSITIES = {
    "deterministic": Density(has_scale=False, is_mixture=False),
    "normal": Density(has_scale=True, is_mixture=False),
    "mixture_normal": Density(has_scale=True, is_mixture=True),
}


def count_maps(density: str, components: int) -> tuple[int, int]:
    """Return the number of components of a density, and the number of maps that a network predicts for it.

    Each component has a location map, and a scale map if the density has scales.

    Args:
        density: a name in `DENSITIES`.
        components: number of components of a mixture; other densities have one.

    Raises:
        ValueError: the density is unknown.
    """
    if density not in DENSITIES:
        raise ValueError(f"unknown transition density {density!r}; choose from {', '.join(DENSITIES)}")
    components = components if DENSITIES[density].is_mixture else 1
    return components, components * (1 + DENSITIES[density].has_scale)


def initial_bias(key: jax.Array, shape: tuple[int, ...], components: int, scale: float) -> Float[Array, "A maps C"]:
    """Initialize biases: 0 for the first `components` maps (locations), the inverse of softplus at `scale` for the scales."""
    return jnp.zeros(shape).at[:, components:].set(scale + math.log(-math.expm1(-scale)))


def soft_mixture(
    weights: Float[Array, "..."],
    loc: Float[Array, "..."],
    scale: Float[Array, "..."],
    axis: int = -1,
) -> Normal:
    """Return the soft mixture of normals: the weighted *average* of one sample per component, not a draw of one component.

    An average of independent normals is a normal with mean sum_k w_k loc_k and variance sum_k (w_k s_k)^2. It has a density,
    and a sample needs only one noise value per element. For fixed weights, its scale sqrt(sum_k (w_k s_k)^2) is Lipschitz in
    (s_1, ..., s_k) with constant sqrt(sum_k w_k^2) <= 1, so a Lipschitz constant of all components holds for the average.

    Args:
        weights: nonnegative, with sum 1 over `axis`; they broadcast to `loc` and `scale` along the other axes.
        loc, scale: the components, along `axis`.

    Raises:
        ValueError: see `average_scale`.
    """
    return Normal(jnp.sum(weights * loc, axis), average_scale(weights, scale, axis))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def average_scale(weights: Float[Array, "*#shape"], scale: Float[Array, "*shape"], axis: int = -1) -> Float[Array, "..."]:
    """Return the standard deviation sqrt(sum_k (w_k s_k)^2) of a weighted average of independent variables.

    Args:
        weights, scale: the components, along `axis`; the weights broadcast to the scales along the other axes.

    Raises:
        ValueError: the two differ in rank, or in length along `axis`.
    """
    # a loop over the components, because a reduction would first write all squares to memory
    return jnp.sqrt(sum((w * s) ** 2 for w, s in _components(weights, scale, axis)))


def _components(weights, scale, axis):
    if weights.ndim != scale.ndim or weights.shape[axis] != scale.shape[axis]:
        raise ValueError(
            f"weights {weights.shape} and scales {scale.shape} must have the same rank and length along axis {axis}"
        )
    take = lambda x, k: jax.lax.index_in_dim(x, k, axis, keepdims=False)  # noqa: E731
    return [(take(weights, k), take(scale, k)) for k in range(scale.shape[axis])]


def _average_scale_forward(weights, scale, axis):
    average = average_scale(weights, scale, axis)
    return average, (weights, scale, average)


def _average_scale_backward(axis, residuals, g):
    weights, scale, average = residuals
    # divide once, not per component; where the average is 0, every (w s)^2 is 0 and any divisor will do
    g = jax.lax.optimization_barrier(g / jnp.where(average > 0, average, 1.0))
    g = jnp.expand_dims(g, axis)
    return weights * _summed(g * scale**2, scale.shape, weights.shape), g * weights**2 * scale


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _summed(x, shape, to):
    """Sum x to the shape `to`: the gradient of broadcasting an array to x's `shape`."""
    axes = [i for i in range(len(shape)) if to[i] < shape[i]]
    if axes:
        # sum the shortest axis in a loop, which vectorizes; reductions are slow in XLA's CPU backend
        shortest = min(axes, key=lambda i: shape[i])
        terms = (jax.lax.index_in_dim(x, k, shortest) for k in range(shape[shortest]))
        x = jax.lax.optimization_barrier(sum(terms))
    return jnp.sum(x, axes, keepdims=True)


# the gradient of the loop would be a sum of as many arrays
_summed.defvjp(lambda x, shape, to: (_summed(x, shape, to), None), lambda shape, to, _, g: (jnp.broadcast_to(g, shape),))


average_scale.defvjp(_average_scale_forward, _average_scale_backward)


def straight_through(hard: Float[Array, "*shape"], soft: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the value of `hard` with the gradient of `soft` (Bengio et al., 2013)."""
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


@flax.struct.dataclass
class Categorical:
    """V independent categorical variables with C classes each. Samples are one-hot, like categorical latents.

    Samples are straight-through: without a `temperature`, they have the gradient of the probabilities. With one, they have
    the gradient of the Gumbel-softmax with the same noise, softmax((log p + Gumbel noise) / temperature) (Jang et al., 2017,
    section 2.2; Maddison et al., 2017).
    """

    logits: Float[Array, "*batch V C"]
    temperature: float | None = flax.struct.field(pytree_node=False, default=None)

    def sample(self, key: jax.Array) -> Float[Array, "*batch V C"]:
        """Draw a straight-through sample."""
        gumbel = jax.random.gumbel(key, self.logits.shape, self.logits.dtype)
        drawn = jax.nn.one_hot(jnp.argmax(self.logits + gumbel, axis=-1), self.logits.shape[-1])
        soft = self.mean() if self.temperature is None else jax.nn.softmax((self.logits + gumbel) / self.temperature)
        return straight_through(drawn, soft)

    def mean(self) -> Float[Array, "*batch V C"]:
        """Return the probabilities."""
        return jax.nn.softmax(self.logits)

    def log_prob(self, z: Float[Array, "*batch V C"]) -> Float[Array, "*batch V"]:
        """Return the log-probability of the one-hot values z, per variable."""
        return jnp.sum(z * jax.nn.log_softmax(self.logits), axis=-1)
