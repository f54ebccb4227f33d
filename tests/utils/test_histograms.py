"""Histograms of parameters and gradients, against NumPy's."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from utils.histograms import EDGES, histogram, statistics, track_gradients

jitted_histogram = jax.jit(histogram)
NUMBERS = st.floats(width=32, allow_nan=False, allow_subnormal=False)


@settings(deadline=None)
@given(arrays(np.float32, st.integers(0, 20), elements=NUMBERS))
def test_counts_are_numpys(x):
    """Bins are half open towards 0, so that a number and its negative mirror each other; NumPy's are so towards -inf."""
    inside = np.clip(x, np.nextafter(np.float32(EDGES[0]), np.float32(0)), np.nextafter(np.float32(EDGES[-1]), np.float32(0)))
    padded = np.full(20, np.nan, np.float32)  # NaN is in no bin; programs are compiled for one size, not for each
    padded[: len(x)] = x
    positive = np.histogram(inside[inside >= 0], EDGES)[0]
    negative = np.histogram(-inside[inside < 0], EDGES)[0][::-1]
    np.testing.assert_array_equal(jitted_histogram(padded), positive + negative)


def test_counts_of_nothing_are_zero():
    assert not np.asarray(jitted_histogram(np.zeros(0, np.float32))).any()


def test_powers_of_two_by_hand():
    counts = np.asarray(jitted_histogram(jnp.array([0.0, 2.0**-31, -(2.0**-30), 1.0, 1.5, -3.0, 1e9, -1e9])))
    found = {(float(EDGES[i]), float(EDGES[i + 1])): int(n) for i, n in enumerate(counts) if n}
    assert found == {
        (-(2.0**-30), 2.0**-30): 2, (-(2.0**-29), -(2.0**-30)): 1, (1.0, 2.0): 2, (-4.0, -2.0): 1,
        (512.0, 1024.0): 1, (-1024.0, -512.0): 1,
    }  # fmt: skip


def test_each_array_has_a_norm_and_a_histogram_under_its_name():
    tree = {"encoder": {"params": {"Dense_0": {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.zeros(2)}}}}
    found = jax.device_get(jax.jit(lambda tree: statistics(tree, "params/"))(tree))
    kernel, bias = "params/encoder/Dense_0/kernel", "params/encoder/Dense_0/bias"
    assert set(found) == {kernel, bias, f"{kernel}/norm", f"{bias}/norm"}
    assert float(found[f"{kernel}/norm"]) == 5.0 and found[kernel].sum() == 2


@pytest.mark.parametrize("on", [False, True])
def test_gradients_cost_only_their_norm_when_they_are_not_asked_for(on):
    args = SimpleNamespace(track_grads=on, track_every=3)
    grads = {"w": jnp.ones(4)}
    compiled = jax.make_jaxpr(lambda k: track_gradients(grads, k, args))(jnp.asarray(0))
    assert any("cond" in str(equation.primitive) for equation in compiled.eqns) == on
    track = jax.jit(lambda k: track_gradients(grads, k, args))
    found = [track(jnp.asarray(k)) for k in range(4)]
    assert [float(one["losses/grad_norm"]) for one in found] == [2.0] * 4
    if on:
        assert [float(one["grads/w/norm"]) for one in found] == [2.0, 0.0, 0.0, 2.0]
    else:
        assert all(set(one) == {"losses/grad_norm"} for one in found)
    assert "dreams/grad_norm" in track_gradients(grads, jnp.asarray(1), args, "dreams")
