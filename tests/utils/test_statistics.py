"""Aggregates over games and seeds: by hand, against scipy, and whether intervals cover what they should."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from utils import statistics

EXACT = {"rtol": 0, "atol": 1e-9}
GAMES = st.lists(st.lists(st.integers(-50, 50), min_size=2, max_size=6), min_size=1, max_size=4)


def arrays(games):
    return [np.array(game, float) for game in games]


def test_by_hand():
    """Two games of four runs. Sorted, all eight are -1 0 0 1 2 3 4 8; the middle half is 0 1 2 3."""
    scores = arrays([[0, 1, 3, 8], [2, 0, -1, 4]])  # means 3 and 1.25
    assert_allclose(statistics.mean(scores), 2.125, **EXACT)
    assert_allclose(statistics.median(scores), 2.125, **EXACT)
    assert_allclose(statistics.interquartile_mean(scores), 1.5, **EXACT)
    # what exceeds 1 counts as 1: means of (0 1 1 1) and (1 0 -1 1), 0.75 and 0.25
    assert_allclose(statistics.optimality_gap(scores), 0.5, **EXACT)
    assert_allclose(statistics.optimality_gap(scores, 0.0), -((0 + -0.25) / 2), **EXACT)
    profile = statistics.performance_profile(scores, np.array([-2.0, 0.0, 3.0, 8.0]))
    assert_allclose(profile, [1, (3 / 4 + 2 / 4) / 2, (1 / 4 + 1 / 4) / 2, 0], **EXACT)
    # of 2 x 2 pairs: (1, 1) a tie, (1, 0), (5, 1), (5, 0) wins: 3.5 / 4; and in the other game 0 of 2 x 1
    better = statistics.probability_of_improvement(arrays([[1, 5], [0, 1]]), arrays([[1, 0], [3]]))
    assert_allclose(better, (3.5 / 4 + 0) / 2, **EXACT)
    assert_allclose(statistics.median(arrays([[1], [10], [4]])), 4, **EXACT)
    assert_allclose(statistics.mean(arrays([[1, 1, 1, 1], [3]])), 2, **EXACT)  # a game counts once, however many runs it has


@given(GAMES, GAMES)
@settings(max_examples=60, deadline=None)
def test_against_scipy(games, others):
    n = min(len(games), len(others))
    scores, others = arrays(games)[:n], arrays(others)[:n]
    every = np.concatenate(scores)
    cut = len(every) // 4
    assert_allclose(statistics.interquartile_mean(scores), np.sort(every)[cut : len(every) - cut].mean(), **EXACT)
    wins = [
        stats.mannwhitneyu(x, y, method="asymptotic").statistic / (len(x) * len(y))
        if np.ptp(np.concatenate([x, y]))
        else 0.5  # of equal numbers alone, which scipy warns of
        for x, y in zip(scores, others, strict=True)
    ]
    found = statistics.probability_of_improvement(scores, others)
    assert_allclose(found, np.mean(wins), **EXACT)
    assert_allclose(found, 1 - statistics.probability_of_improvement(others, scores), **EXACT)


@given(GAMES)
@settings(max_examples=40, deadline=None)
def test_many_resamplings_at_once_are_one_after_the_other(games):
    scores = arrays(games)
    drawn = statistics.resample(scores, np.random.default_rng(0), 7)
    thresholds = np.array([-1.0, 0.5])
    for statistic in (*statistics.AGGREGATES.values(), lambda x: statistics.performance_profile(x, thresholds)):
        one_by_one = [statistic([game[i] for game in drawn]) for i in range(7)]
        assert_allclose(statistic(drawn), one_by_one, **EXACT)
    other = statistics.resample(scores, np.random.default_rng(1), 7)
    one_by_one = [statistics.probability_of_improvement([x[i] for x in drawn], [y[i] for y in other]) for i in range(7)]
    assert_allclose(statistics.probability_of_improvement(drawn, other), one_by_one, **EXACT)


def test_resampling_stays_within_a_game_and_draws_every_run_alike():
    scores = arrays([[0, 1, 2], [10, 11]])
    drawn = statistics.resample(scores, np.random.default_rng(3), 20_000)
    assert [x.shape for x in drawn] == [(20_000, 3), (20_000, 2)]
    for game, x in zip(scores, drawn, strict=True):
        values, counts = np.unique(x, return_counts=True)
        assert_allclose(values, game)
        assert_allclose(counts / x.size, 1 / len(game), atol=0.01)
    # of the 27 samples of (0, 1, 2) three have a mean up to 1/3 and three one of 5/3 or more, if 0 and 2 are left out: at 80%
    means = sorted(np.mean(sample) for sample in product([0, 1, 2], repeat=3))
    assert_allclose(statistics.interval(statistics.mean(drawn[:1]), 0.8), [means[2], means[-3]], **EXACT)


@pytest.mark.parametrize("runs, least", [(20, 0.92), (5, 0.85)])
def test_intervals_cover_the_truth(runs, least):
    """Ten games of other means and spreads, 300 studies: of the nominal 95%, what the percentile bootstrap keeps. (Fewer runs
    keep less, because the spread of a few runs is too small.)"""
    rng = np.random.default_rng(5)
    means, spreads = rng.normal(size=10), rng.uniform(0.2, 2.0, 10)
    covered = 0
    for _ in range(300):
        scores = [rng.normal(mean, spread, runs) for mean, spread in zip(means, spreads, strict=True)]
        _, (low, high) = statistics.with_interval(scores, statistics.mean, rng)
        covered += low <= means.mean() <= high
    assert least <= covered / 300 <= 0.98
