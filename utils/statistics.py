"""What many runs say together: aggregates of scores over games and seeds, with intervals by the stratified bootstrap.

After Agarwal et al. (2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv 2108.13264). Scores
are a list with an array for each game, which holds a number for each run (seed); games may have different numbers of runs. A
statistic takes such a list, whose arrays may have further axes before the last: resamplings, as `resample` makes them.
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
    """Mean over games of their means over runs."""
    return np.asarray(np.mean([x.mean(axis=-1) for x in scores], axis=0))


def median(scores: Scores) -> Float[np.ndarray, "*resamplings"]:
    """Median over games of their means over runs."""
    return np.asarray(np.median([x.mean(axis=-1) for x in scores], axis=0))


def interquartile_mean(scores: Scores) -> Float[np.ndarray, "*resamplings"]:
    """IQM: mean of the middle half of all runs of all games; of n runs floor(n / 4) are left out on either side."""
    return np.asarray(stats.trim_mean(np.concatenate(scores, axis=-1), 0.25, axis=-1))


def optimality_gap(scores: Scores, target: float = 1.0) -> Float[np.ndarray, "*resamplings"]:
    """By how much runs fall short of the target, what exceeds it not counting; mean over games. Lower is better."""
    return np.asarray(target - mean([np.minimum(x, target) for x in scores]))


def performance_profile(scores: Scores, thresholds: Float[np.ndarray, " K"]) -> Float[np.ndarray, "*resamplings K"]:
    """The share of runs whose score is above each threshold; mean over games."""
    return np.mean([np.mean(x[..., None, :] > thresholds[:, None], axis=-1) for x in scores], axis=0)


def probability_of_improvement(scores: Scores, others: Scores) -> Float[np.ndarray, "*resamplings"]:
    """How likely a run of the first beats one of the second in a game taken at random; a tie counts one half (Mann-Whitney's
    U over the number of pairs, mean over games)."""
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
    """Draws, for each game by itself, as many of its runs as there are, with replacement; `number` times."""
    return [np.asarray(x)[rng.integers(len(x), size=(number, len(x)))] for x in scores]


def interval(values: Float[np.ndarray, "R *shape"], confidence: float = CONFIDENCE) -> Float[np.ndarray, "2 *shape"]:
    """Between which values the middle of the resampled ones lies (the percentile bootstrap)."""
    tail = 100 * (1 - confidence) / 2
    return np.percentile(values, [tail, 100 - tail], axis=0)


def with_interval(scores: Scores, statistic: Statistic, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of the scores, and the ends of its interval."""
    return statistic(scores), interval(statistic(resample(scores, rng)))
