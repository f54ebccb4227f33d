"""Exact terms of the guarantee for tabular environments and latent models (docs/guarantees.md).

In both, the last state is the end of the episode: it leads to itself with reward 0. Computations are in float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

HORIZON = 2000  # maximum number of steps for which step-wise errors are computed


class Tables(NamedTuple):
    """A Markov decision process."""

    probability: Float[np.ndarray, "S A S"]  # of the next state
    reward: Float[np.ndarray, "S A"]
    start: Float[np.ndarray, " S"]  # probability of each state at the start of an episode


def under(tables: Tables, policy: Float[np.ndarray, "S A"]) -> tuple[Float[np.ndarray, "S S"], Float[np.ndarray, " S"]]:
    """Return the next-state probabilities and the expected reward of each state under a policy."""
    return np.einsum("sa,sat->st", policy, tables.probability), np.sum(policy * tables.reward, axis=1)


def values(tables: Tables, policy: Float[np.ndarray, "S A"], gamma: float) -> Float[np.ndarray, " S"]:
    """Return the value of each state under a policy."""
    probability, reward = under(tables, policy)
    return np.linalg.solve(np.eye(len(reward)) - gamma * probability, reward)


def episode_length(tables: Tables, policy: Float[np.ndarray, "S A"]) -> float:
    """Return the mean number of steps to the end; inf if an episode may never end."""
    probability, _ = under(tables, policy)
    alive = probability[:-1, :-1]
    if np.max(np.abs(np.linalg.eigvals(alive)), initial=0.0) >= 1 - 1e-12:
        return np.inf
    return float(tables.start[:-1] @ np.linalg.solve(np.eye(len(alive)) - alive, np.ones(len(alive))))


def total_variation(p: Float[np.ndarray, "*#batch S"], q: Float[np.ndarray, "*#batch S"]) -> Float[np.ndarray, "..."]:
    """Return the total variation: the Wasserstein distance if different states are at distance 1."""
    return 0.5 * np.sum(np.abs(p - q), axis=-1)


def wasserstein_on_line(x: Float[np.ndarray, " S"]) -> Callable:
    """Return a function that computes the Wasserstein distance of distributions over states at the points x of a line."""
    order = np.argsort(x)

    def distance(p, q):
        above = np.cumsum((p - q)[..., order], axis=-1)[..., :-1]
        return np.sum(np.abs(above) * np.diff(x[order]), axis=-1)

    return distance


class Terms(NamedTuple):
    """The terms of the value-difference bound of a latent policy."""

    real: float  # rho(pi, M)
    latent: float  # rho(pibar, Mbar)
    ratio_max: float  # D, over all states and actions
    k_value: float
    span: float  # of the latent value
    reward_error: Float[np.ndarray, "S A"]
    distance: Float[np.ndarray, "S A"]
    ratio: Float[np.ndarray, "S A"]


def difference_terms(
    real: Tables,
    latent: Tables,
    phi: Int[np.ndarray, " S"],
    latent_policy: Float[np.ndarray, "Z A"],
    behavior: Float[np.ndarray, "S A"],
    gamma: float,
    wasserstein: Callable,
) -> Terms:
    """Compute the terms of the policy pibar . phi from episodes of `behavior`, which must give every action a probability > 0.

    Args:
        real, latent: environment and latent model. The model starts at phi of the real start; its own start is ignored.
        phi: the latent of each state; it maps the end to the end.
        latent_policy: pibar.
        behavior: pi_b.
        gamma: the discount.
        wasserstein: computes the distance of two distributions over latents.
    """
    codes = np.eye(len(latent.reward))
    policy = latent_policy[phi]
    latent_values = values(latent, latent_policy, gamma)
    distances = wasserstein(codes[:, None], codes[None])
    apart = distances > 0
    differences = np.abs(latent_values[:, None] - latent_values[None])
    ratio = policy / behavior
    ratio[-1] = 1.0  # there is no decision at the end
    return Terms(
        real=float(real.start @ values(real, policy, gamma)),
        latent=float(real.start @ latent_values[phi]),
        ratio_max=float(np.max(ratio)),
        k_value=float(np.max(differences[apart] / distances[apart], initial=0.0)),
        span=float(np.max(latent_values) - np.min(latent_values)),
        reward_error=np.abs(real.reward - latent.reward[phi]),
        distance=wasserstein(real.probability @ codes[phi], latent.probability[phi]),
        ratio=ratio,
    )


def errors_over_time(
    real: Tables, behavior: Float[np.ndarray, "S A"], errors: Float[np.ndarray, "S A"]
) -> Float[np.ndarray, " H"]:
    """Return E[errors(s_t, a_t)] over the episodes of `behavior`, for t = 0, 1, ..., H - 1, with H = `HORIZON`."""
    probability, _ = under(real, behavior)
    expected, state, result = np.sum(behavior * errors, axis=1), real.start, np.zeros(HORIZON)
    for t in range(HORIZON):
        if state[-1] >= 1 - 1e-13:
            break
        result[t] = state @ expected
        state = state @ probability
    return result


def visits(real: Tables, policy: Float[np.ndarray, "S A"]) -> Float[np.ndarray, "S A"]:
    """Return the mean number of visits to each state and action per episode, 0 for the end. All episodes must end."""
    probability, _ = under(real, policy)
    alive = probability[:-1, :-1]
    return np.append(np.linalg.solve((np.eye(len(alive)) - alive).T, real.start[:-1]), 0.0)[:, None] * policy


def mean_error(real: Tables, behavior: Float[np.ndarray, "S A"], errors: Float[np.ndarray, "S A"]) -> float:
    """Return the mean of the errors over the transitions of the episodes of `behavior`, all of which must end."""
    often = visits(real, behavior)
    return float(np.sum(often * errors) / np.sum(often))


def of_environment(probability: np.ndarray, reward: np.ndarray, terminal: np.ndarray, start: int) -> Tables:
    """Return the tables of an environment with terminal states, which are merged into one end state."""
    alive = np.flatnonzero(~terminal)
    size = len(alive) + 1
    tables = Tables(np.zeros((size, reward.shape[1], size)), np.zeros((size, reward.shape[1])), np.zeros(size))
    tables.probability[:-1, :, :-1] = probability[np.ix_(alive, range(reward.shape[1]), alive)]
    tables.probability[..., -1] = 1.0 - tables.probability.sum(axis=-1)
    tables.reward[:-1] = reward[alive]
    tables.start[np.flatnonzero(alive == start)] = 1.0
    return tables


def fitted_model(real: Tables, phi: Int[np.ndarray, " S"], latents: int, weights: Float[np.ndarray, "S A"]) -> Tables:
    """Return the latent model whose reward and next latents at (z, a) are weighted means over the states with latent z.

    If all weights at (z, a) are 0, the model stays in z with reward 0.
    """
    codes = np.eye(latents)[phi]
    mass = np.einsum("sz,sa->za", codes, weights)
    share = np.where(mass[phi] > 0, weights / np.where(mass > 0, mass, 1.0)[phi], 0.0)
    probability = np.einsum("sz,sa,sat,ty->zay", codes, share, real.probability, codes)
    reward = np.einsum("sz,sa,sa->za", codes, share, real.reward)
    probability = np.where(mass[..., None] > 0, probability, np.eye(latents)[:, None])
    return Tables(probability, reward, real.start @ codes)
