"""What a latent world model guarantees about the real environment: the terms and the bounds of docs/guarantees.md.

A policy that acts on latents, pi = pibar . phi, has a return rho(pi) in the environment and a return rho(pibar) in the latent
model. Both are discounted, from the start of an episode to its end. With the local error

    f(s, a) = |R(s, a) - Rbar(phi(s), a)| + gamma E min(K_V d(phi(s'), z'), span),    s' ~ P(.|s, a), z' ~ Pbar(.|phi(s), a)

|rho(pi) - rho(pibar)| is at most the discounted sum of f along the episodes of pi. Here that sum is bounded by what is seen on
the episodes of another policy pi_b, with the ratios pi / pi_b at most D. Each function says when it holds, and returns inf, an
upper bound that says nothing, where it does not. All are pure, jittable, and equations of docs/guarantees.md.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from utils.losses import masked_mean

Number = Float[Array, ""] | float


def _product(a, b):
    """a b, and 0 where one of them is 0, be the other infinite."""
    return jnp.where((jnp.asarray(a) == 0) | (jnp.asarray(b) == 0), 0.0, jnp.asarray(a) * b)


def value_span(reward_range: tuple[float, float], gamma: float) -> float:
    """Largest difference of two returns, or two values, when rewards lie in the range and episodes may end (equation 2).

    Raises:
        ValueError: gamma is not in [0, 1).
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma {gamma}: returns are bounded for a gamma in [0, 1) only")
    low, high = reward_range
    return (max(high, 0.0) - min(low, 0.0)) / (1 - gamma)


def value_lipschitz(
    k_reward: Number, k_transition: Number, k_policy: Number, gamma: Number, span: Number, k_end: Number = 0.0
) -> Float[Array, ""]:
    """K_V: Lipschitz constant of the value of a latent policy (equation 3); inf unless gamma k_transition < 1.

    Args:
        k_reward: of z -> Rbar(z, a), for each action.
        k_transition: of z -> Pbar(.|z, a), for each action, in the Wasserstein distance.
        k_policy: of z -> pibar(.|z) in total variation, half the sum of absolute differences.
        gamma: the discount.
        span: of the values, see `value_span`.
        k_end: of z -> probability that the episode ends, for each action, where that is no part of Pbar.
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
    """f of each transition: what one step adds at most to the difference of the returns (equation 4).

    Args:
        reward_error: |R - Rbar|.
        distance: d(phi(s'), z') of any coupling of the two, 0 where the episode ends.
        k_value: K_V.
        gamma: the discount.
        span: of the values; no next value is off by more.
    """
    return reward_error + gamma * jnp.minimum(_product(k_value, distance), span)


def stepwise_bound(errors: Float[Array, " H"], ratio_max: Number, gamma: Number, span: Number) -> Float[Array, ""]:
    """Bound on |rho(pi) - rho(pibar)| by the errors of each step, for any D and gamma (equation 6). Never more than `span`.

    min over h <= H of sum_{t < h} (gamma D)^t errors[t] + gamma^h span.

    Args:
        errors: E[ratio_t f(s_t, a_t)] over the episodes of pi_b, t = 0, 1, ..., ended ones counting 0; or D E[f(s_t, a_t)].
        ratio_max: D.
        gamma: the discount.
        span: largest difference of two returns.
    """
    t = jnp.arange(errors.shape[0] + 1)
    # in logarithms: (gamma D)^t may be too large for float32 where it times the error is not
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
    """The step-wise bound from transitions at random times of the episodes of pi_b (equation 7), for any D and gamma.

    episode_length * mean((gamma D)^age errors). With (gamma D)^age <= 1 where gamma D <= 1, it is at most `episodic_bound`.
    With gamma D > 1 the mean may be infinite, and then that of a sample says little.

    Args:
        errors: ratio f of each transition, or D f; of pi_b itself (D = 1) f.
        ages: how many steps of its episode came before.
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
    """D * AEL * (L_R + gamma K_V L_P), the bound by averages alone (equation 8); inf unless gamma D <= 1.

    Args:
        mean_error: mean of f over the transitions of pi_b.
        ratio_max: D.
        gamma: the discount.
        episode_length: AEL, mean length of the episodes of pi_b.
    """
    return jnp.where(gamma * ratio_max <= 1, ratio_max * _product(episode_length, mean_error), jnp.inf)


def is_vacuous(zeta: Number, span: Number) -> Array:
    """Whether zeta is so large that no improvement can be promised: none in the latent model is larger than the span."""
    return ~(jnp.asarray(zeta) < span)
