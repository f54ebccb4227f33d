"""Bounds on how far returns in a latent world model are from those in the environment (docs/guarantees.md).

A policy pi = pibar . phi that acts on latents has a return rho(pi) in the environment and a return rho(pibar) in the latent
model. Both are discounted, from the start of an episode to its end. With the local error

    f(s, a) = |R(s, a) - Rbar(phi(s), a)| + gamma E min(K_V d(phi(s'), z'), span),    s' ~ P(.|s, a), z' ~ Pbar(.|phi(s), a)

|rho(pi) - rho(pibar)| is at most the discounted sum of f along the episodes of pi. The functions bound that sum from episodes
of another policy pi_b, with ratios pi / pi_b of at most D. Each function documents when its bound holds, and returns inf, a
vacuous upper bound, otherwise. All are pure and jittable. Equation numbers refer to docs/guarantees.md.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from utils.losses import masked_mean

Number = Float[Array, ""] | float


def _product(a, b):
    """Return a b, with 0 inf = 0."""
    return jnp.where((jnp.asarray(a) == 0) | (jnp.asarray(b) == 0), 0.0, jnp.asarray(a) * b)


def value_span(reward_range: tuple[float, float], gamma: float) -> float:
    """Return the largest difference of two returns or values, if rewards are in the range and episodes may end (equation 2).

    Raises:
        ValueError: gamma is not in [0, 1).
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma {gamma}: must be in [0, 1), or returns are unbounded")
    low, high = reward_range
    return (max(high, 0.0) - min(low, 0.0)) / (1 - gamma)


def value_lipschitz(
    k_reward: Number, k_transition: Number, k_policy: Number, gamma: Number, span: Number, k_end: Number = 0.0
) -> Float[Array, ""]:
    """Return K_V, a Lipschitz constant of the value of a latent policy (equation 3); inf unless gamma k_transition < 1.

    Args:
        k_reward: Lipschitz constant of z -> Rbar(z, a), for each action.
        k_transition: Lipschitz constant of z -> Pbar(.|z, a) in the Wasserstein distance, for each action.
        k_policy: Lipschitz constant of z -> pibar(.|z) in total variation (half the sum of absolute differences).
        gamma: the discount.
        span: span of the values, see `value_span`.
        k_end: Lipschitz constant of z -> probability that the episode ends, for each action; 0 if Pbar includes the end.
    """
    contracts = gamma * jnp.asarray(k_transition) < 1
    steepness = k_reward + _product(k_policy + gamma * jnp.asarray(k_end), span)
    return jnp.where(contracts, steepness / jnp.where(contracts, 1 - gamma * k_transition, 1.0), jnp.inf)


def local_error(
    reward_error: Float[Array, "*shape"],
    distance: Float[Array, "*shape"],
    k_value: Number,
    gamma: Number,
    span: Number,
) -> Float[Array, "*shape"]:
    """Return f of each transition: the most that one step adds to the difference of the returns (equation 4).

    Args:
        reward_error: |R - Rbar|.
        distance: d(phi(s'), z') for any coupling of the two; 0 where the episode ends.
        k_value: K_V.
        gamma: the discount.
        span: span of the values, an upper limit of the error of the next value.
    """
    return reward_error + gamma * jnp.minimum(_product(k_value, distance), span)


def stepwise_bound(errors: Float[Array, " H"], ratio_max: Number, gamma: Number, span: Number) -> Float[Array, ""]:
    """Bound |rho(pi) - rho(pibar)| by the errors of each step, for any D and gamma (equation 6). Never more than `span`.

    min over h <= H of sum_{t < h} (gamma D)^t errors[t] + gamma^h span.

    Args:
        errors: E[ratio_t f(s_t, a_t)] or D E[f(s_t, a_t)] over the episodes of pi_b, t = 0, 1, ...; f is 0 after the end.
        ratio_max: D.
        gamma: the discount.
        span: largest difference of two returns.
    """
    t = jnp.arange(errors.shape[0] + 1)
    # use logarithms: (gamma D)^t may overflow float32 even if its product with the error does not
    terms = jnp.exp(_product(t[:-1], jnp.log(jnp.asarray(gamma * ratio_max, jnp.float32))) + jnp.log(errors))
    partial_sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.where(errors == 0, 0.0, terms))])
    rest = jnp.where(jnp.isinf(span), jnp.inf, jnp.asarray(gamma, jnp.float32) ** t * span)
    return jnp.min(partial_sums + rest)


def aged_bound(
    errors: Float[Array, "*shape"],
    ages: Num[Array, "*shape"],
    valid: Bool[Array, "*shape"],
    ratio_max: Number,
    gamma: Number,
    episode_length: Number,
) -> Float[Array, ""]:
    """Return the step-wise bound from transitions at random times of the episodes of pi_b (equation 7), for any D and gamma.

    It is episode_length * mean((gamma D)^age errors). If gamma D <= 1, then (gamma D)^age <= 1, and it is at most
    `episodic_bound`. If gamma D > 1, the mean may be infinite, and a sample mean is then not informative.

    Args:
        errors: per transition, ratio * f or D * f; for pi_b itself (D = 1), f.
        ages: number of steps of the episode before each transition.
        valid: which transitions count.
        ratio_max: D.
        gamma: the discount.
        episode_length: mean length of the episodes of pi_b.
    """
    return _product(episode_length, masked_mean(_product((gamma * ratio_max) ** ages, errors), valid))


def episodic_bound(
    mean_error: Number,
    ratio_max: Number,
    gamma: Number,
    episode_length: Number,
) -> Float[Array, ""]:
    """Return D * AEL * mean_error, the bound from averages (equation 8); inf unless gamma D <= 1.

    Args:
        mean_error: mean of f over the transitions of pi_b, which is at most L_R + gamma K_V L_P.
        ratio_max: D.
        gamma: the discount.
        episode_length: AEL, mean length of the episodes of pi_b.
    """
    return jnp.where(gamma * ratio_max <= 1, ratio_max * _product(episode_length, mean_error), jnp.inf)


def is_vacuous(zeta: Number, span: Number) -> Array:
    """Return True if zeta is too large to promise an improvement: no improvement in the latent model exceeds the span."""
    return ~(jnp.asarray(zeta) < span)
