"""Shapes are checked in every test: jaxtyping's import hook wraps all functions of the helper packages."""

import os
import shutil
import signal
import sys
from pathlib import Path

# Optimizing the small programs of the default tests takes longer than running them. The first process decides for its workers.
# tests/test_command_line.py trains on Atari with the optimizations that users have.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int("slow" not in sys.argv)))

if "PYTEST_XDIST_WORKER" not in os.environ and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # most of the suite's time is compilation; a second run finds its programs, keyed by their content
    cache = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
    if sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) > 2**30:
        shutil.rmtree(cache)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small programs too: there are thousands
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # modules too: each script that is started would take 3 s longer
        os.environ["PYTHONPYCACHEPREFIX"] = str(cache / "modules")

import jax
import pytest
from jaxtyping import install_import_hook

if not jax.config.jax_platforms or "cpu" in jax.config.jax_platforms:
    jax.config.update("jax_num_cpu_devices", 2)  # for those tests that use two; the others use the first

CHECKED = ["envs", "networks", "utils.dreams", "utils.evaluation", "utils.guarantees", "experiments.study"]
MODULES = ("devices", "distributions", "histograms", "losses", "metrics", "neighborhood", "occasionally", "world_model")
CHECKED += [f"utils.{name}" for name in MODULES]
install_import_hook(CHECKED, "beartype.beartype")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share a GPU's memory
    # XLA starts as many threads as it may use cores: workers that share all of them get in each other's way
    if hasattr(os, "sched_setaffinity"):
        cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        first = int(worker.removeprefix("gw")) % len(cores)
        os.sched_setaffinity(0, cores[first::workers])


def pytest_collection_modifyitems(items):
    """Skip the tests of MinAtar where its games (GPL-3) are not installed."""
    from envs.minatar import is_installed

    if is_installed():
        return
    skip = pytest.mark.skip(reason="needs MinAtar: uv run --group minatar-tests pytest")
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.get_closest_marker("minatar") or "MinAtar" in str(params):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def heeding():
    """Signals as Python has them, whatever starts the tests; a script that ends ignores them, the next test does not."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {s: signal.signal(s, handler) for s, handler in defaults.items()}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)
