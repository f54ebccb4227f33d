"""Draw how the exact value on the confounding gridworld depends on two flags of an algorithm: a heat map.

    uv run experiments/gridworld_sensitivity.py --x clip-coef 0.05 0.1 0.2 --y transition-loss-coef 0 0.01 --output sensitivity
    uv run experiments/gridworld_sensitivity.py --x reward-loss-coef 0 0.1 --y transition-loss-coef 0 0.01 --clip-coef 0.2

A cell is the mean over seeds of the exact value of the start state, averaged over the last tenth of a run. The runs are those
of `confounding_gridworld.py`, as fast as there, and its flags apply to all cells. OUTPUT.csv has a row for each run: repeat the
command after an interruption to train only the cells that are missing. Several processes may add to one table. OUTPUT.png is
the heat map.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

from dataclasses import dataclass, replace  # noqa: E402
from typing import NamedTuple  # noqa: E402

import numpy as np  # noqa: E402

from envs.confounding_gridworld import ENV_ID  # noqa: E402
from experiments import confounding_gridworld, heatmap  # noqa: E402
from experiments.confounding_gridworld import DISTINCT, VALUE, command_of, train  # noqa: E402
from experiments.study.figures import styled  # noqa: E402
from experiments.study.records import check_table  # noqa: E402
from utils.files import locked, write_csv  # noqa: E402
from utils.runs.flags import UsageError, parse_command, require  # noqa: E402
from utils.runs.launch import describe_device, run_main  # noqa: E402
from utils.runs.outputs import check_output  # noqa: E402

COLUMNS = ("command", "seed", "value", "distinct_latents")


@dataclass
class Args(confounding_gridworld.Args):
    """Draw how the exact value on the confounding gridworld depends on two flags of an algorithm."""

    x: tuple[str, ...] = ("clip-coef", "0.0101", "0.05", "0.1", "0.2", "0.3")
    """horizontal axis: a flag, and its values"""
    y: tuple[str, ...] = ("transition-loss-coef", "0", "5e-4", "5e-3", "5e-2")
    """vertical axis: a flag, and its values"""
    output: str = "gridworld_sensitivity"
    """path of the heat map (.png) and its data (.csv), without an extension"""
    algorithms: tuple[str, ...] = ("Deep SPI",)
    """the algorithm"""


class Cell(NamedTuple):
    """A cell of the heat map.

    Attributes:
        x: value along the horizontal axis, as typed.
        y: value along the vertical axis, as typed.
        args: flags of its runs.
        command: what trains them in the algorithm's own script; identifies the cell in the table.
    """

    x: str
    y: str
    args: Args
    command: str


def plan(args: Args) -> list[Cell]:
    """Return all cells, row by row.

    Raises:
        UsageError: an axis is not a flag with distinct values, or the algorithm's script does not accept them.
    """
    require(len(args.algorithms) == 1, "--algorithms: name one")
    require(bool(args.x and args.y), "--x and --y: name a flag and its values")
    numbers = {field: value for field, value in vars(args).items() if isinstance(value, (int, float))}
    axes = {}
    for side, (name, *values) in (("--x", args.x), ("--y", args.y)):
        field = name.replace("-", "_")
        require(field in numbers, f"--{name}: {side} can be {', '.join(sorted(numbers))}".replace("_", "-"))
        require(field not in axes, f"--x and --y: both are {name}; choose two flags")
        try:
            axes[field] = {type(numbers[field])(value): value for value in values}
        except ValueError as error:
            raise UsageError(f"{side} {name}: {error}") from None
        require(len(axes[field]) == len(values) > 0, f"{side} {name}: name at least one value, and each once")
    (x_field, xs), (y_field, ys) = axes.items()
    cells = []
    for y, y_text in ys.items():
        for x, x_text in xs.items():
            one = replace(args, **{x_field: x, y_field: y})
            confounding_gridworld.check(one)
            cells.append(Cell(x_text, y_text, one, command_of(args.algorithms[0], one)))
    distinct = len({cell.command for cell in cells}) == len(cells)
    require(distinct, f"--x {args.x[0]} --y {args.y[0]}: {args.algorithms[0]} does not read one of them")
    return cells


def read(table: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """Return value and number of distinct latents of all runs in the table, by command and seed.

    Raises:
        UsageError: it is not a table of this script.
    """
    rows = check_table(table, COLUMNS, "--output")
    try:
        return {(row["command"], int(row["seed"])): (float(row["value"]), float(row["distinct_latents"])) for row in rows}
    except (TypeError, ValueError):
        raise UsageError(f"{table}: is damaged; choose another --output") from None


def main(args: Args) -> None:
    """Train the cells that are not in the table, and draw the heat map."""
    cells = plan(args)
    picture, table = (check_output(f"{args.output}{ending}", "--output", make_parent=True) for ending in (".png", ".csv"))
    known = read(table)
    print(describe_device())
    found = {}
    for number, cell in enumerate(cells, 1):
        missing = tuple(seed for seed in args.seeds if (cell.command, seed) not in known)
        if missing:
            curves = train(args.algorithms[0], replace(cell.args, seeds=missing))
            last = curves[VALUE].shape[1] - max(1, curves[VALUE].shape[1] // 10)
            for seed, value, distinct in zip(missing, curves[VALUE], curves[DISTINCT], strict=True):
                known[cell.command, seed] = float(value[last:].mean()), float(distinct[-1])
            with locked(table):
                known = known | read(table)  # another process may have added runs
                write_csv(table, COLUMNS, [(*key, f"{value:.6g}", f"{n:g}") for key, (value, n) in known.items()])
        values = np.array([known[cell.command, seed][0] for seed in args.seeds])
        found[ENV_ID, cell.y, cell.x] = values
        print(
            f"{number} of {len(cells)}: --{args.x[0]} {cell.x} --{args.y[0]} {cell.y}: mean {values.mean():.2f}, "
            f"from {values.min():.2f} to {values.max():.2f}",
            flush=True,
        )
    with styled():
        figure = heatmap.draw(found, args.x[0], args.y[0], "exact value of the start")
        figure.savefig(picture, dpi=150, metadata={"Software": None})
    print(f"written: {picture}, {table}")


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)), out_of_memory="out of memory: name fewer --seeds at a time")
