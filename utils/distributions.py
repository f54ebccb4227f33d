"""The distributions of latents: continuous ones (a point, a normal, a soft mixture of normals) and categorical ones."""

import math
from functools import partial, reduce
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@flax.struct.dataclass
class Deterministic:
    """A point mass. It has no density, hence no `log_prob`."""

    loc: Float[Array, "*shape"]

    def sample(self, key: jax.Array) -> Float[Array, "*shape"]:
        """The point; the key is not used."""
        return self.loc

    def mean(self) -> Float[Array, "*shape"]:
        """The point."""
        return self.loc


MIN_SCALE = 1e-6  # of a normal
INITIAL_SCALE = math.log(2)  # what `positive_scale` makes of 0


def clipped_normal(key: jax.Array, shape: tuple[int, ...], bound: float) -> Float[Array, "*shape"]:
    """Standard normal noise clipped to [-bound, bound], of half the random bits: 16 each, which is ample within the bound."""
    size = math.prod(shape)
    bits = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    halves = jnp.concatenate([bits & 0xFFFF, bits >> 16])[:size].reshape(shape)
    uniform = (halves.astype(jnp.float32) + 0.5) / 2**15 - 1.0  # the middles of 2^16 intervals: the noise is symmetric
    return jnp.clip(math.sqrt(2) * jax.lax.erf_inv(uniform), -bound, bound)


@flax.struct.dataclass
class Normal:
    """Independent normals. With `noise_clip` c the standard noise of a sample is clipped to [-c, c].

    The clip is what makes a sample a Lipschitz function of (loc, scale): |dz'| <= |dloc| + c |dscale| for any fixed noise.
    """

    loc: Float[Array, "*shape"]
    scale: Float[Array, "*shape"]
    noise_clip: float | None = flax.struct.field(pytree_node=False, default=None)

    def sample(self, key: jax.Array) -> Float[Array, "*shape"]:
        """One reparameterized sample (gradients reach loc and scale)."""
        if self.noise_clip is None:
            noise = jax.random.normal(key, self.loc.shape, self.loc.dtype)
        else:
            noise = clipped_normal(key, self.loc.shape, self.noise_clip)
        # drawing noise is dear, and XLA would do it again wherever it is used
        noise = jax.lax.optimization_barrier(noise)
        return self.loc + self.scale * noise

    def mean(self) -> Float[Array, "*shape"]:
        """The expectation: `loc`, with or without the clip, which is symmetric."""
        return self.loc

    def log_prob(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Log-density per element.

        Raises:
            ValueError: the noise is clipped; that distribution has atoms, and no density.
        """
        if self.noise_clip is not None:
            raise ValueError("a normal with clipped noise has no density: use noise_clip=None, or sample from it")
        return -0.5 * ((x - self.loc) / self.scale) ** 2 - jnp.log(self.scale) - 0.5 * jnp.log(2 * jnp.pi)

    def absolute_error(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """E|X - x| per element, in closed form: the mean of a folded normal (Leone et al., 1961).

        It is the Wasserstein distance between the normal and the point x.

        Raises:
            ValueError: the noise is clipped.
        """
        if self.noise_clip is not None:
            raise ValueError(
                "the closed form is that of a normal without clipped noise: use noise_clip=None, or sample from it"
            )
        error = (x - self.loc) / self.scale
        return self.scale * (math.sqrt(2 / math.pi) * jnp.exp(-0.5 * error**2) + error * jax.lax.erf(error / math.sqrt(2)))


# log(1 + u) / u for u in [0, 1], lowest degree first: the interpolation at Chebyshev's points, off by 2e-7
LOG_COEFFICIENTS = (
    0.99999978, -0.49997175, 0.33271928, -0.24474774, 0.17687477, -0.10685003, 0.04349390, -0.00837115
)  # fmt: skip


@jax.custom_jvp
def positive_scale(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """softplus(x) + `MIN_SCALE`, softplus(x) = log(1 + e^x): 1-Lipschitz.

    A polynomial stands for the logarithm, which is most of the work of `jax.nn.softplus`.
    """
    u = jnp.exp(-jnp.abs(x))
    log_over_u = reduce(lambda value, coefficient: value * u + coefficient, reversed(LOG_COEFFICIENTS))
    # the barrier keeps XLA from computing it anew in the gradient, which needs only the result
    return jax.lax.optimization_barrier(jnp.maximum(x, 0.0) + u * log_over_u + MIN_SCALE)


positive_scale.defjvps(lambda tangent, scale, _: tangent * (1.0 - jnp.exp(MIN_SCALE - scale)))  # the sigmoid of x


class Density(NamedTuple):
    """A kind of transition distribution: whether its components have scales, and whether it may have several components."""

    has_scale: bool
    is_mixture: bool


DENSITIES = {
    "deterministic": Density(has_scale=False, is_mixture=False),
    "normal": Density(has_scale=True, is_mixture=False),
    "mixture_normal": Density(has_scale=True, is_mixture=True),
}


def count_maps(density: str, components: int) -> tuple[int, int]:
    """Number of components of a density, and number of maps that a network predicts for it: a location for each component,
    and a scale where the density has one.

    Args:
        density: a name in `DENSITIES`.
        components: of a mixture; other densities have one.

    Raises:
        ValueError: the density is unknown.
    """
    if density not in DENSITIES:
        raise ValueError(f"unknown transition density {density!r}; choose from {', '.join(DENSITIES)}")
    components = components if DENSITIES[density].is_mixture else 1
    return components, components * (1 + DENSITIES[density].has_scale)


def initial_bias(key: jax.Array, shape: tuple[int, ...], components: int, scale: float) -> Float[Array, "A maps C"]:
    """Initializer: 0 for the first `components` maps, the locations; for scales what `positive_scale` turns into `scale`."""
    return jnp.zeros(shape).at[:, components:].set(scale + math.log(-math.expm1(-scale)))


def soft_mixture(
    weights: Float[Array, "..."],
    loc: Float[Array, "..."],
    scale: Float[Array, "..."],
    axis: int = -1,
) -> Normal:
    """The soft mixture of normals: the weighted *average* of one sample of each component.

    An average of independent normals is a normal, with mean sum_k w_k loc_k and variance sum_k (w_k scale_k)^2, so one noise
    per element is drawn instead of k, and there is a density. (A mixture in the usual sense would draw one component.)
    For fixed weights the scale sqrt(sum_k (w_k s_k)^2) is a Lipschitz function of (s_1, ..., s_k) with constant
    sqrt(sum_k w_k^2) <= 1, so a certificate for every component holds for the average.

    Args:
        weights: non-negative, summing to 1 over `axis`; they broadcast to the others along other axes.
        loc, scale: the components, along `axis`.

    Raises:
        ValueError: as `average_scale`.
    """
    return Normal(jnp.sum(weights * loc, axis), average_scale(weights, scale, axis))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def average_scale(weights: Float[Array, "*#shape"], scale: Float[Array, "*shape"], axis: int = -1) -> Float[Array, "..."]:
    """Standard deviation sqrt(sum_k (w_k s_k)^2) of a weighted average of independent variables.

    Args:
        weights, scale: the components, along `axis`; the weights broadcast to the scales along other axes.

    Raises:
        ValueError: the two differ in rank, or in length along `axis`.
    """
    # one loop over the components, and over them again in the gradient: a reduction would write all squares to memory first
    return jnp.sqrt(sum((w * s) ** 2 for w, s in _components(weights, scale, axis)))


def _components(weights, scale, axis):
    if weights.ndim != scale.ndim or weights.shape[axis] != scale.shape[axis]:
        raise ValueError(
            f"weights {weights.shape} and scales {scale.shape} must have one rank and one length along axis {axis}"
        )
    take = lambda x, k: jax.lax.index_in_dim(x, k, axis, keepdims=False)  # noqa: E731
    return [(take(weights, k), take(scale, k)) for k in range(scale.shape[axis])]


def _average_scale_forward(weights, scale, axis):
    average = average_scale(weights, scale, axis)
    return average, (weights, scale, average)


def _average_scale_backward(axis, residuals, g):
    weights, scale, average = residuals
    # where the average is 0, so is each (w s)^2; one division, not one for each component
    g = jax.lax.optimization_barrier(g / jnp.where(average > 0, average, 1.0))
    g = jnp.expand_dims(g, axis)
    return weights * _summed_like(g * scale**2, weights), g * weights**2 * scale


def _summed_like(x, like):
    """The gradient of broadcasting `like` to the shape of x."""
    axes = [i for i in range(x.ndim) if like.shape[i] < x.shape[i]]
    if axes:
        # the shortest axis term by term, in one loop that vectorises: XLA's CPU backend is slow to reduce, and has less left
        shortest = min(axes, key=lambda i: x.shape[i])
        terms = (jax.lax.index_in_dim(x, k, shortest) for k in range(x.shape[shortest]))
        x = jax.lax.optimization_barrier(sum(terms))
    return jnp.sum(x, axes, keepdims=True)


average_scale.defvjp(_average_scale_forward, _average_scale_backward)


def straight_through(hard: Float[Array, "*shape"], soft: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The value of `hard` with the gradient of `soft` (Bengio et al., 2013)."""
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


@flax.struct.dataclass
class Categorical:
    """V independent categorical variables with C classes each; what is drawn is one-hot, as codes are.

    Samples are straight-through. Without a `temperature` they have the gradient of the probabilities; with one that of the
    Gumbel-softmax, softmax((log p + Gumbel noise) / temperature), of the same noise (Jang et al., 2017, section 2.2; Maddison
    et al., 2017).
    """

    logits: Float[Array, "*batch V C"]
    temperature: float | None = flax.struct.field(pytree_node=False, default=None)

    def sample(self, key: jax.Array) -> Float[Array, "*batch V C"]:
        """One reparameterized sample."""
        gumbel = jax.random.gumbel(key, self.logits.shape, self.logits.dtype)
        drawn = jax.nn.one_hot(jnp.argmax(self.logits + gumbel, axis=-1), self.logits.shape[-1])
        soft = self.mean() if self.temperature is None else jax.nn.softmax((self.logits + gumbel) / self.temperature)
        return straight_through(drawn, soft)

    def mean(self) -> Float[Array, "*batch V C"]:
        """The probabilities."""
        return jax.nn.softmax(self.logits)

    def log_prob(self, z: Float[Array, "*batch V C"]) -> Float[Array, "*batch V"]:
        """Log-probability of the (one-hot) values z of each variable."""
        return jnp.sum(z * jax.nn.log_softmax(self.logits), axis=-1)
