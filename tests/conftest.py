"""Shapes are checked in every test: jaxtyping's import hook wraps all functions of the helper packages."""

import os

from jaxtyping import install_import_hook

CHECKED = ["envs", "networks", "utils.dreams", "utils.guarantees"]
CHECKED += [
    f"utils.{name}"
    for name in ("distributions", "histograms", "losses", "metrics", "neighbourhood", "occasionally", "world_model")
]
install_import_hook(CHECKED, "beartype.beartype")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share a GPU's memory
    # XLA starts as many threads as it may use cores: workers that share all of them get in each other's way
    if hasattr(os, "sched_setaffinity"):
        cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        first = int(worker.removeprefix("gw")) % len(cores)
        os.sched_setaffinity(0, cores[first::workers])
