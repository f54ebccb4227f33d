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


def value_span(reward_range: tuple[float, float], gamma: float) -> float:
    """Largest difference of two returns, or two values, when rewards lie in the range and episodes may end (equation 2).

    Raises:
        ValueError: gamma is not in [0, 1).
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma {gamma}: returns are bounded for a gamma in [0, 1) only")
    low, high = reward_range
    return (max(high, 0.0) - min(low, 0.0)) / (1 - gamma)


def value_lipschitz(k_reward: Number, k_transition: Number, k_policy: Number, gamma: Number, span: Number) -> Float[Array, ""]:
    """K_V: Lipschitz constant of the value of a latent policy (equation 3); inf unless gamma k_transition < 1.

    Args:
        k_reward: of z -> Rbar(z, a), for each action.
        k_transition: of z -> Pbar(.|z, a), for each action, in the Wasserstein distance.
        k_policy: of z -> pibar(.|z) in total variation, half the sum of absolute differences.
        gamma: the discount.
        span: of the values, see `value_span`.
    """
    contracts = gamma * jnp.asarray(k_transition) < 1
    # where either is 0 the product is, be the other infinite
    policy_term = jnp.where(jnp.asarray(k_policy) == 0, 0.0, k_policy * span)
    return jnp.where(contracts, (k_reward + policy_term) / jnp.where(contracts, 1 - gamma * k_transition, 1.0), jnp.inf)


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
    apart = jnp.minimum(jnp.where(distance > 0, k_value * distance, 0.0), span)
    return reward_error + gamma * apart


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
    # in logarithms, for (gamma D)^t may be too large where the error is 0
    log_terms = t[:-1] * jnp.log(jnp.maximum(gamma * ratio_max, 1e-30)) + jnp.log(jnp.maximum(errors, 1e-30))
    terms = jnp.where(errors > 0, jnp.exp(log_terms), 0.0)
    partial_sums = jnp.concatenate([jnp.zeros(1), jnp.cumsum(terms)])
    return jnp.min(partial_sums + jnp.asarray(gamma, jnp.float32) ** t * span)


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
    weighted = jnp.where(errors > 0, (gamma * ratio_max) ** ages * errors, 0.0)
    return episode_length * masked_mean(weighted, valid)


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
    return jnp.where(gamma * ratio_max <= 1, ratio_max * episode_length * mean_error, jnp.inf)


def is_vacuous(zeta: Number, span: Number) -> Array:
    """Whether a bound on the difference of two returns says nothing: it allows any that rewards in their range can make."""
    return ~(jnp.asarray(zeta) < span)
