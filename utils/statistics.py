"""Aggregate scores over games and seeds, with stratified bootstrap confidence intervals.

The method is that of Agarwal et al. (2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv
2108.13264). Scores are a list of one array per game, with one element per run (seed); games may have different numbers of runs.
A statistic takes such a list. Its arrays may have leading axes for resamplings, as `resample` returns them.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

Scores = Sequence[Float[np.ndarray, "*resamplings _"]]  # the last axis: runs
Statistic = Callable[[Scores], Float[np.ndarray, "*resamplings"]]

RESAMPLINGS = 5_000
CONFIDENCE = 0.95


def mean(scores: Scores) -> Float[np.ndarray, "*resamplings"]:
    """Return the mean over games of the mean over runs."""
    return np.asarray(np.mean([x.mean(axis=-1) for x in scores], axis=0))


def median(scores: Scores) -> Float[np.ndarray, "*resamplings"]:
    """Return the median over games of the mean over runs."""
    return np.asarray(np.median([x.mean(axis=-1) for x in scores], axis=0))


def interquartile_mean(scores: Scores) -> Float[np.ndarray, "*resamplings"]:
    """Return the IQM: the mean of the n runs of all games without the floor(n / 4) lowest and the floor(n / 4) highest."""
    return np.asarray(stats.trim_mean(np.concatenate(scores, axis=-1), 0.25, axis=-1))


def optimality_gap(scores: Scores, target: float = 1.0) -> Float[np.ndarray, "*resamplings"]:
    """Return the mean over games of how far runs fall short of the target (0 above it). Lower is better."""
    return np.asarray(target - mean([np.minimum(x, target) for x in scores]))


def performance_profile(scores: Scores, thresholds: Float[np.ndarray, " K"]) -> Float[np.ndarray, "*resamplings K"]:
    """Return the fraction of runs whose score is above each threshold, as a mean over games."""
    return np.mean([np.mean(x[..., None, :] > thresholds[:, None], axis=-1) for x in scores], axis=0)


def probability_of_improvement(scores: Scores, others: Scores) -> Float[np.ndarray, "*resamplings"]:
    """Return the probability that a run of `scores` beats one of `others` in a random game; a tie counts one half. It is the
    mean over games of the Mann-Whitney U divided by the number of pairs."""
    wins = []
    for x, y in zip(scores, others, strict=True):
        difference = x[..., :, None] - y[..., None, :]
        wins.append(np.mean((difference > 0) + 0.5 * (difference == 0), axis=(-2, -1)))
    return np.asarray(np.mean(wins, axis=0))


AGGREGATES: dict[str, Statistic] = {
    "median": median,
    "IQM": interquartile_mean,
    "mean": mean,
    "optimality gap": optimality_gap,
}


def resample(scores: Scores, rng: np.random.Generator, number: int = RESAMPLINGS) -> list[Float[np.ndarray, "R _"]]:
    """Resample the runs of each game with replacement, keeping their number; repeat this `number` times."""
    return [np.asarray(x)[rng.integers(len(x), size=(number, len(x)))] for x in scores]


def interval(values: Float[np.ndarray, "R *shape"], confidence: float = CONFIDENCE) -> Float[np.ndarray, "2 *shape"]:
    """Return the ends of the interval that contains the middle `confidence` of resampled values (percentile bootstrap)."""
    tail = 100 * (1 - confidence) / 2
    return np.percentile(values, [tail, 100 - tail], axis=0)


def with_interval(scores: Scores, statistic: Statistic, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a statistic of the scores, and the ends of its confidence interval."""
    return statistic(scores), interval(statistic(resample(scores, rng)))
