"""What is logged of updates and rollouts, by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from envs.protocol import EpisodeStats
from utils.metrics import explained_variance, rollout_metrics, scan_with_metrics, summarize
from utils.occasionally import MEASURED, only_measured

NAME = "losses/explained_variance"


def test_metrics_kept_as_one_array_are_those_kept_one_by_one():
    def step(carry, x):
        return carry + x, ({"sum": carry, "bins": jnp.stack([x, carry])}, carry > 2)

    xs = jnp.arange(5.0)
    found, expected = scan_with_metrics(step, 0.0, xs), jax.lax.scan(step, 0.0, xs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(jnp.dtype, found) == jax.tree.map(jnp.dtype, expected)


def test_explained_variance():
    target = jnp.array([[1.0, 3.0], [5.0, 99.0]])
    error = jnp.array([[0.5, -0.5], [0.0, 42.0]])
    valid = jnp.array([[True, True], [True, False]])
    found = explained_variance(error, target, valid)
    assert_allclose(found[NAME], 1 - (0.5 / 3) / (8 / 3), rtol=1e-6)
    assert only_measured(found).keys() == {NAME}


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("value", [0.0, 1e-3, 1.1, -12345.6])
def test_targets_that_are_all_the_same_have_no_variance_to_explain(size, value):
    """Not even where their mean is rounded."""
    target = jnp.full(size, value)
    found = explained_variance(target - 0.3, target, jnp.ones(size, bool))
    assert np.isfinite(found[NAME]) and only_measured(found) == {}
    nothing = explained_variance(target, jnp.arange(size * 1.0), jnp.zeros(size, bool))  # no step was valid
    assert np.isfinite(nothing[NAME]) and only_measured(nothing) == {}


def test_what_is_no_number_is_seen():
    found = explained_variance(jnp.ones(3), jnp.array([1.0, jnp.nan, 2.0]), jnp.ones(3, bool))
    assert np.isnan(only_measured(found)[NAME])


def test_marks_are_of_one_name_or_of_a_folder():
    marks = {"a/b": 0.0, "c/": 0.0, "g": 1.0}
    values = {name: np.ones(()) for name in ("a/b", "a/b2", "c/d", "c/e/f", "cd", "g")}
    values |= {name + MEASURED: np.asarray(mark) for name, mark in marks.items()}
    assert only_measured(values).keys() == {"a/b2", "cd", "g"}


def test_summary_leaves_out_what_was_skipped():
    metrics = {
        "losses/x": jnp.array([1.0, 2.0, 6.0, 100.0]),
        "spi/ratio_max": jnp.array([9.0, 1.2, 1.1, 100.0]),
        "spi/ratio_min": jnp.array([0.1, 0.9, 0.8, -100.0]),
        "spi/outside_fraction": jnp.array([1.0, 0.5, 0.25, 100.0]),
    }
    found = summarize(metrics, jnp.array([True, True, True, False]), 2)
    expected = {"losses/x": 3.0, "spi/ratio_max": 1.2, "spi/ratio_min": 0.8, "spi/outside_fraction": 0.375}
    assert {name: pytest.approx(float(value)) for name, value in found.items()} == expected


def test_summary_of_histograms_is_of_each_bin():
    ratios = {name: jnp.ones(3) for name in ("spi/ratio_max", "spi/ratio_min", "spi/outside_fraction")}
    found = summarize(
        ratios | {"grads/w": jnp.array([[1.0, 0.0], [3.0, 4.0], [50.0, 50.0]])}, jnp.array([True, True, False]), 2
    )
    assert_allclose(found["grads/w"], [2.0, 2.0])


def test_mean_returns_are_of_the_episodes_that_count():
    """Two environments that began anew in the middle of a run: the first ends three episodes, the second its first one between
    the first's second and third."""
    episode, steps = EpisodeStats.zeros(2, midway=True), []
    for ends in ([1, 0], [1, 0], [0, 1], [1, 0]):
        episode = episode.update(jnp.array([5.0, 1.0]), jnp.ones(2, bool), jnp.array(ends, bool))
        steps.append(episode)
    flags = jnp.ones((4, 2), bool)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *steps)
    rollout = SimpleNamespace(episode=stacked, value=jnp.zeros((5, 2)), valid=flags)
    env = SimpleNamespace(exact_metrics=lambda _: {})
    found = rollout_metrics(None, rollout, jnp.ones((4, 2)), env, None)
    assert float(found["charts/episodes"]) == 1 and float(found["charts/episodic_return"]) == 10.0  # two steps of 5
    assert float(found["charts/episodic_length"]) == 2.0
