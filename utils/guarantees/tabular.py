"""Every term of the guarantee, exactly, where environment and latent model are tables (docs/guarantees.md).

In both the last state is the end of the episode: it leads to itself and pays nothing. All in float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

HORIZON = 2000  # steps after which the step-wise errors are cut off, if the episode has not ended with certainty before


class Tables(NamedTuple):
    """A Markov decision process."""

    probability: Float[np.ndarray, "S A S"]  # of the next state
    reward: Float[np.ndarray, "S A"]
    start: Float[np.ndarray, " S"]  # probability of each state at the start of an episode


def under(tables: Tables, policy: Float[np.ndarray, "S A"]) -> tuple[Float[np.ndarray, "S S"], Float[np.ndarray, " S"]]:
    """Next-state probabilities and expected reward of each state."""
    return np.einsum("sa,sat->st", policy, tables.probability), np.sum(policy * tables.reward, axis=1)


def values(tables: Tables, policy: Float[np.ndarray, "S A"], gamma: float) -> Float[np.ndarray, " S"]:
    """The value of each state."""
    probability, reward = under(tables, policy)
    return np.linalg.solve(np.eye(len(reward)) - gamma * probability, reward)


def episode_length(tables: Tables, policy: Float[np.ndarray, "S A"]) -> float:
    """Mean number of steps to the end; inf where it may never come."""
    probability, _ = under(tables, policy)
    alive = probability[:-1, :-1]
    if np.max(np.abs(np.linalg.eigvals(alive)), initial=0.0) >= 1 - 1e-12:
        return np.inf
    return float(tables.start[:-1] @ np.linalg.solve(np.eye(len(alive)) - alive, np.ones(len(alive))))


def total_variation(p: Float[np.ndarray, "*#batch S"], q: Float[np.ndarray, "*#batch S"]) -> Float[np.ndarray, "..."]:
    """The Wasserstein distance where different states are at distance 1."""
    return 0.5 * np.sum(np.abs(p - q), axis=-1)


def wasserstein_on_line(x: Float[np.ndarray, " S"]) -> Callable:
    """The Wasserstein distance of two distributions over states that lie at the points x of a line."""
    order = np.argsort(x)

    def distance(p, q):
        above = np.cumsum((p - q)[..., order], axis=-1)[..., :-1]
        return np.sum(np.abs(above) * np.diff(x[order]), axis=-1)

    return distance


class Terms(NamedTuple):
    """What the value-difference bound of a latent policy is made of."""

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
    """The terms for the policy pibar . phi, seen through the episodes of `behavior`, which may take every action.

    Args:
        real, latent: environment and model; the latent model's start is overruled, it is phi of the real one.
        phi: the latent of each state, that of the end being the end.
        latent_policy: pibar.
        behavior: pi_b.
        gamma: the discount.
        wasserstein: of two distributions over latents.
    """
    codes = np.eye(len(latent.reward))
    policy = latent_policy[phi]
    latent_values = values(latent, latent_policy, gamma)
    distances = wasserstein(codes[:, None], codes[None])
    apart = distances > 0
    differences = np.abs(latent_values[:, None] - latent_values[None])
    ratio = policy / behavior
    ratio[-1] = 1.0  # nothing is decided at the end
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
    """E[errors(s_t, a_t)] over the episodes of `behavior`, for t = 0, 1, ..., H - 1, H = `HORIZON`."""
    probability, _ = under(real, behavior)
    expected, state, result = np.sum(behavior * errors, axis=1), real.start, np.zeros(HORIZON)
    for t in range(HORIZON):
        if state[-1] >= 1 - 1e-13:
            break
        result[t] = state @ expected
        state = state @ probability
    return result


def visits(real: Tables, policy: Float[np.ndarray, "S A"]) -> Float[np.ndarray, "S A"]:
    """How often each state and action occurs in an episode on average, the end left out. Episodes end with certainty."""
    probability, _ = under(real, policy)
    alive = probability[:-1, :-1]
    return np.append(np.linalg.solve((np.eye(len(alive)) - alive).T, real.start[:-1]), 0.0)[:, None] * policy


def mean_error(real: Tables, behavior: Float[np.ndarray, "S A"], errors: Float[np.ndarray, "S A"]) -> float:
    """Mean of the errors over the transitions of the episodes of `behavior`, which end with certainty."""
    often = visits(real, behavior)
    return float(np.sum(often * errors) / np.sum(often))


def of_environment(probability: np.ndarray, reward: np.ndarray, terminal: np.ndarray, start: int) -> Tables:
    """Tables of an environment given with terminal states, which become one: the end."""
    alive = np.flatnonzero(~terminal)
    size = len(alive) + 1
    tables = Tables(np.zeros((size, reward.shape[1], size)), np.zeros((size, reward.shape[1])), np.zeros(size))
    tables.probability[:-1, :, :-1] = probability[np.ix_(alive, range(reward.shape[1]), alive)]
    tables.probability[..., -1] = 1.0 - tables.probability.sum(axis=-1)
    tables.reward[:-1] = reward[alive]
    tables.start[np.flatnonzero(alive == start)] = 1.0
    return tables


def fitted_model(real: Tables, phi: Int[np.ndarray, " S"], latents: int, weights: Float[np.ndarray, "S A"]) -> Tables:
    """The latent model that is right on average: of each (z, a) the mean over the states with that latent, by the weights.

    Where all weights are 0, it stays where it is for nothing.
    """
    codes = np.eye(latents)[phi]
    mass = np.einsum("sz,sa->za", codes, weights)
    share = np.where(mass[phi] > 0, weights / np.where(mass > 0, mass, 1.0)[phi], 0.0)
    probability = np.einsum("sz,sa,sat,ty->zay", codes, share, real.probability, codes)
    reward = np.einsum("sz,sa,sa->za", codes, share, real.reward)
    probability = np.where(mass[..., None] > 0, probability, np.eye(latents)[:, None])
    return Tables(probability, reward, real.start @ codes)
