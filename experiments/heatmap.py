"""Draw the final scores of a study over two flags of its script: a heat map for each environment.

    uv run experiments/heatmap.py runs/sensitivity --x clip-coef --y transition-loss-coef --output sensitivity.png
    uv run experiments/heatmap.py runs/sensitivity --x reward-loss-coef --y transition-loss-coef --where clip-coef=0.1

A cell is the mean over seeds of the mean return of the last tenth of a run. Cells without a finished run are empty, and cells
with fewer finished runs than others say how many they have: runs that diverge are often those that are missing. Next to the
picture, a table (.csv) has mean, standard deviation, and number of runs of each cell.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

from dataclasses import dataclass, replace  # noqa: E402
from typing import Annotated  # noqa: E402

import numpy as np  # noqa: E402
import tyro  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from experiments.study.figures import styled  # noqa: E402
from experiments.study.records import (  # noqa: E402
    LEFT_OUT,
    RunRecord,
    args_of_script,
    check_table,
    flag_name,
    labels,
    last_tenth,
    read_runs,
    split_flags,
)
from utils.files import write_csv  # noqa: E402
from utils.runs.flag_types import as_typed  # noqa: E402
from utils.runs.flags import UsageError, defaults, parse_command, require  # noqa: E402
from utils.runs.launch import run_main  # noqa: E402
from utils.runs.outputs import check_output, refuse_input  # noqa: E402
from utils.runs.stored_flags import no_settings  # noqa: E402


@dataclass
class Args:
    """Draw the final scores of a study over two flags of its script."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders of runs or of studies, tables (.csv), or W&B projects"""
    x: str
    """flag along the horizontal axis"""
    y: str
    """flag along the vertical axis"""
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """use only runs with this value of another flag, clip-coef=0.1. Repeat it for each flag"""
    metric: str = "charts/episodic_return"
    """metric to average over the last tenth of a run"""
    output: Path = Path("heatmap.png")
    """path of the picture (.png); the table has the same name, with .csv"""


def value_of(run: RunRecord, flag: str) -> str:
    """Return the run's value of a flag, as on the command line. That of a switch is True or False.

    Raises:
        UsageError: the run's script has no such flag, or the runs of a study cannot differ in it.
    """
    name, said = flag.replace("-", "_"), f"{run.source}: script {run.script} cannot be imported; add its folder to PYTHONPATH"
    try:
        args_type = args_of_script(run.script)
    except Exception:
        raise UsageError(said) from None
    usual = defaults(args_type, run.env_id)
    require(name in usual, f"--{flag}: {run.script} has no such flag")
    require(name not in no_settings(args_type), f"--{flag}: does not affect results, or is averaged over; choose another flag")
    typed = next((word for word in split_flags(run.flags) if flag_name(word) == flag), as_typed(name, usual[name]))
    if isinstance(usual[name], bool):
        return str(not typed.startswith("--no-"))
    return typed.removeprefix(f"--{flag}").strip() or "(none)"


def in_order(values: set[str]) -> list[str]:
    """Return the values sorted by their numbers, or by the alphabet if they are not all numbers."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def cells(runs: list[RunRecord], x: str, y: str) -> dict[tuple[str, str, str], np.ndarray]:
    """Return the final scores of the finished runs of each cell, by environment, value of y, and value of x.

    Raises:
        UsageError: the runs are of several scripts, differ in other flags too, or contain duplicates.
    """
    labels(runs)  # refuses duplicates
    scripts = {run.script for run in runs}
    require(len(scripts) == 1, f"the runs are of several scripts, {', '.join(sorted(scripts))}; name folders of one")
    others: dict[str, set[str]] = {}
    found: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
        rest = (word for word in split_flags(run.flags) if flag_name(word) not in (x, y))
        others.setdefault(run.env_id, set()).add(" ".join(rest))
        of_cell = found.setdefault((run.env_id, value_of(run, y), value_of(run, x)), [])
        of_cell += [last_tenth(run)] if run.is_finished else []
    for env_id, said in others.items():
        words = " and ".join(repr(text or "defaults") for text in sorted(said)[:2])
        require(len(said) == 1, f"runs of {env_id} also differ in other flags: {words}; choose with --where")
    return {cell: np.array(scores) for cell, scores in found.items()}


def draw(found: dict[tuple[str, str, str], np.ndarray], x: str, y: str, what: str) -> Figure:
    """Return a figure with a heat map for each environment, in the style that is in force. Scores that are not finite do not
    count."""
    env_ids, ys, xs = (list(dict.fromkeys(cell[i] for cell in found)) for i in range(3))
    ys, xs = in_order(set(ys)), in_order(set(xs))
    most = max(map(len, found.values()))
    figure = Figure(figsize=(max(3.0, 0.75 * len(xs) + 1.4) * len(env_ids), 0.55 * len(ys) + 1.2))
    for panel, env_id in zip(figure.subplots(1, len(env_ids), squeeze=False)[0], env_ids, strict=True):
        means, counts = np.full((len(ys), len(xs)), np.nan), np.zeros((len(ys), len(xs)), int)
        for (env, row, column), scores in found.items():
            scores, place = scores[np.isfinite(scores)], (ys.index(row), xs.index(column))
            if env == env_id and len(scores):
                means[place], counts[place] = scores.mean(), len(scores)
        image = panel.imshow(means, cmap="viridis", origin="lower", aspect="auto")
        for (row, column), mean in np.ndenumerate(means):
            if np.isfinite(mean):
                bright = image.norm(mean) > 0.6
                count = int(counts[row, column])
                said = f"{mean:.3g}" + f"\n({count} of {most})" * (count < most)
                panel.text(column, row, said, ha="center", va="center", color="black" if bright else "white")
        panel.set_xticks(range(len(xs)), xs)
        panel.set_yticks(range(len(ys)), ys)
        panel.set(title=f"{env_id}: {what}", xlabel=f"--{x}", ylabel=f"--{y}")
        panel.spines[:].set_visible(False)
    return figure


def main(args: Args) -> None:
    """Read the runs, draw the figure, and write the table."""
    x, y = (flag.removeprefix("--").replace("_", "-") for flag in (args.x, args.y))
    require(x != y, f"--x {x} --y {y}: name two flags")
    args = replace(args, output=check_output(args.output, "--output"))
    require(args.output.suffix == ".png", f"--output {args.output}: name a .png file")
    table = check_output(args.output.with_suffix(".csv"), "--output")
    refuse_input(table, args.runs, f"--output {args.output}")
    require(len(args.runs) > 0, "no runs: name folders of runs or of studies, tables, or W&B projects")
    runs, problems, *_ = read_runs(args.runs, args.metric)
    for problem in problems:
        print(f"*** {problem} ***")
    for text in args.where:
        flag, equals, value = text.removeprefix("--").partition("=")
        require(bool(equals), f"--where {text}: write flag=value")
        flag = flag.replace("_", "-")
        runs = [run for run in runs if _same(value_of(run, flag), value)]
    require(len(runs) > 0, "no run is left to draw; see the lines above, or change --where")
    found = cells(runs, x, y)
    check_table(table, ("env_id", y, x, "mean", "std", "runs"), "--output")
    for run in runs:
        if not run.is_finished:
            print(f"*** {run.source}: not finished, at {run.reached:,} of {run.planned:,} steps{LEFT_OUT} ***")
    with styled():
        figure = draw(found, x, y, args.metric.rpartition("/")[2].replace("_", " "))
        figure.savefig(args.output, dpi=150)
    rows = [
        (*cell, f"{s.mean():.6g}" if len(s) else "", f"{s.std(ddof=1):.6g}" if len(s) > 1 else "", len(s))
        for cell, s in sorted(found.items())
    ]
    write_csv(table, ("env_id", y, x, "mean", "std", "runs"), rows)
    print(f"{sum(len(scores) for scores in found.values())} finished runs; written: {args.output}, {table}")


def _same(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)))
