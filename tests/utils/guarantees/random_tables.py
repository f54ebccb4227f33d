"""Random environments, latent models and policies as tables."""

from typing import NamedTuple

import numpy as np

from utils.guarantees.tabular import Tables, fitted_model, total_variation, wasserstein_on_line


class Case(NamedTuple):
    real: Tables
    latent: Tables
    phi: np.ndarray
    old: np.ndarray  # latent policies [Z, A]
    new: np.ndarray
    gamma: float
    wasserstein: object


def random_case(seed, states, latents, actions, gamma, ending, noise, step, line):
    """Up to `states` states, mapped to `latents` latents at random; both without the end, which comes on top.

    ending: how likely the episode ends in a step. noise: share of the latent model that has nothing to do with the environment.
    step: how far the new policy is from the old. line: latents lie on a line; otherwise all are at distance 1.
    """
    rng = np.random.default_rng(seed)

    def tables(n):
        probability = np.zeros((n + 1, actions, n + 1))
        ends = ending * rng.uniform(size=(n, actions, 1))
        probability[:-1, :, :-1] = (1 - ends) * rng.dirichlet(np.full(n, 0.3), (n, actions))
        probability[:-1, :, -1:] = ends
        probability[-1, :, -1] = 1.0
        probability /= probability.sum(-1, keepdims=True)
        reward = rng.normal(size=(n + 1, actions))
        reward[-1] = 0.0
        return Tables(probability, reward, np.append(rng.dirichlet(np.ones(n)), 0.0))

    real = tables(states)
    phi = np.append(rng.integers(latents, size=states), latents)
    fitted, other = fitted_model(real, phi, latents + 1, rng.uniform(size=real.reward.shape)), tables(latents)
    mixed = [(1 - noise) * a + noise * b for a, b in zip(fitted, other, strict=True)]
    old = rng.dirichlet(np.ones(actions), latents + 1)
    old = 0.98 * old + 0.02 / actions
    new = old * np.exp(step * rng.uniform(-1, 1, old.shape))
    new /= new.sum(-1, keepdims=True)
    wasserstein = wasserstein_on_line(rng.uniform(-1, 1, latents + 1)) if line else total_variation
    return Case(real, Tables(*mixed), phi, old, new, gamma, wasserstein)
