"""Draws the returns of finished runs over their steps, and writes them as a table.

    uv run benchmarks/learning_curves.py runs/Breakout-v5__ppo__* runs/Breakout-v5__deep_spi__* --output docs/breakout

reads the TensorBoard files of the given run folders and writes `docs/breakout.png` and `docs/breakout.csv`. A point is the mean
of `charts/episodic_return` over the updates of one interval of steps in which an episode ended.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


@dataclass
class Args:
    """Flags of the figure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs; the name of a curve is the folder's, without the time at its end"""
    labels: tuple[str, ...] = ()
    """names of the curves instead, one for each run"""
    interval: int = 20_000
    """steps that a point stands for"""
    output: str = "learning_curves"
    """where the figure (.png) and the table (.csv) go"""


def read_returns(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and mean returns of the updates of a run in which an episode ended.

    Raises:
        ValueError: the folder holds no such updates.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if "charts/episodic_return" not in events.Tags()["scalars"]:
        raise ValueError(f"{folder}: no charts/episodic_return in it: name the folder of a run in which episodes ended")
    returns = events.Scalars("charts/episodic_return")
    return np.array([e.step for e in returns]), np.array([e.value for e in returns])


def main(args: Args) -> None:
    """Reads, draws and writes."""
    labels = args.labels or [folder.name.rpartition("__")[0] for folder in args.runs]
    if not args.runs:
        raise ValueError("no runs: name the folders of the runs to draw")
    if len(labels) != len(args.runs):
        raise ValueError(f"--labels: {len(labels)} names for {len(args.runs)} runs: give one for each run")
    rows = []
    figure, axes = plt.subplots(figsize=(7, 4))
    for label, folder in zip(labels, args.runs, strict=True):
        steps, returns = read_returns(folder)
        interval = (steps - 1) // args.interval
        present = np.unique(interval)
        ends = (present + 1) * args.interval
        means = [returns[interval == k].mean() for k in present]
        rows += [(label, end, f"{mean:.3f}") for end, mean in zip(ends, means, strict=True)]
        axes.plot(ends, means, marker=".", label=label)
    axes.set(xlabel="environment steps", ylabel="return of the episodes that ended")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(f"{args.output}.png", dpi=120, bbox_inches="tight")
    with Path(f"{args.output}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("run", "steps", "episodic_return"), *rows])
    print(f"written: {args.output}.png, {args.output}.csv")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
