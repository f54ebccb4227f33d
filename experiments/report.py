"""Compares runs: learning curves of each game, aggregates over games, and what is missing.

    uv run experiments/report.py runs/study --output docs/study
    uv run experiments/report.py runs/*__ppo__* runs/*__deep_spi__* scores.csv wandb:my-team/deep-spi --output breakout

reads folders of runs, of studies, tables that it or experiments/seeds.py has written, projects of Weights & Biases, and writes
`OUTPUT.html`, one page with all, `OUTPUT.md` with its pictures beside it, `OUTPUT.csv`, the returns of all runs, which it can
read again, and `OUTPUT_scores.csv`, the final score of each. The same command on the same runs writes the same bytes.

A final score is the mean over the episodes that ended in the last part of training. Intervals are 95%: over games by the
stratified bootstrap (Agarwal et al., 2021), of a curve by Student's t over seeds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import shlex  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Annotated  # noqa: E402

import numpy as np  # noqa: E402
import tyro  # noqa: E402

from experiments.study import figures  # noqa: E402
from experiments.study.comparison import (  # noqa: E402
    SCALES,
    Comparison,
    Scale,
    aggregate,
    compare,
    normalized,
    raw_scores,
    usual_scale,
)
from experiments.study.page import Code, Figures, Section, Table, Warned, html, markdown  # noqa: E402
from experiments.study.records import LEFT_OUT, read_runs, stretches, write_table  # noqa: E402
from utils.runs.checkpoints import write_csv, write_whole  # noqa: E402
from utils.runs.flags import require  # noqa: E402
from utils.runs.launch import fail, run_main  # noqa: E402
from utils.statistics import RESAMPLINGS  # noqa: E402

SIZE = (3.6, 2.7)  # of a drawing, in inches


@dataclass
class Args:
    """Flags of the report."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders of runs or of studies, tables (.csv), projects of W&B (wandb:entity/project)"""
    output: Path = Path("report")
    """where it goes: the path without an ending"""
    title: str = "Comparison of runs"
    """the heading"""
    metric: str = "charts/episodic_return"
    """what is compared; of the gridworld charts/init_value is the exact value of the policy"""
    points: int = 40
    """stretches of a run that have a point each on a curve, and a row each in the table"""
    last: float = 0.05
    """the share of a run, at its end, whose episodes make its final score, in whole stretches"""
    scale: Scale | None = None
    """common scale of the games; if not given human where that is known, or min-max (against: shares of --against's mean)"""
    against: str | None = None
    """the algorithm that others are said to improve on; if not given the first, ppo"""
    seed: int = 0
    """of the bootstrap"""
    allow_incomplete: bool = False
    """aggregate although runs are missing or not finished; the figures say so"""


def score_table(comparison: Comparison, raw: dict[tuple[str, str], np.ndarray]) -> Table:
    """Mean and standard deviation over seeds of the final scores, game by game."""

    def cell(scores):
        if not len(scores):
            return "-"
        spread = f" ± {scores.std(ddof=1):.3g}" if len(scores) > 1 else ""
        return f"{scores.mean():.4g}{spread} ({len(scores)})"

    rows = [[env_id, *(cell(raw[name, env_id]) for name in comparison.algorithms)] for env_id in comparison.env_ids]
    return Table([["", *comparison.algorithms], *rows])


def aggregate_sections(args: Args, comparison: Comparison, raw: dict, note: str, beside: str) -> tuple[Section, bytes]:
    """Aggregates over games, as texts and as a picture."""
    returns = args.metric == Args.metric
    scale = args.scale or (usual_scale(comparison) if returns else "min-max")
    require(
        returns or scale in ("min-max", "against"), f"--scale {scale}: is one of returns, and --metric asks for another number"
    )
    against = args.against or comparison.algorithms[0]
    require(against in comparison.algorithms, f"--against {against}: is none of {', '.join(comparison.algorithms)}")
    found = aggregate(normalized(comparison, raw, scale, against), scale, against, args.seed)
    draws = [figures.intervals(comparison, values, name) for name, values in found.statistics.items()]
    draws.append(figures.profiles(comparison, found, f"score ({scale})"))
    if found.improvement:
        draws.append(figures.intervals(comparison, found.improvement, f"probability of improvement on {against}", 0.5))
    single = len(comparison.seeds) == 1  # which says nothing of other seeds
    shown = lambda value, low, high: f"{value:.3f}" + f" [{low:.3f}, {high:.3f}]" * (not single)  # noqa: E731
    rows = [[name, *(shown(*values[name]) for values in found.statistics.values())] for name in comparison.algorithms]
    head = ["", *found.statistics]
    if found.improvement:
        head.append(f"P(better than {against})")
        rows = [[*row, shown(*found.improvement[row[0]]) if row[0] in found.improvement else "-"] for row in rows]
    svgs = [figures.svg(draw, SIZE, "aggregate", note) for draw in draws]
    words = f"Scale {scale}: {SCALES[scale]}. {RESAMPLINGS:,} resamplings, seed {args.seed}. Optimality gap: lower is better."
    drawn = Figures(figures.legend(comparison), svgs, f"{beside}_aggregates.png", "aggregates")
    section = Section("Over all games", [words, drawn, Table([head, *rows])])
    return section, figures.png(comparison, draws, SIZE, 3, note)


def main(args: Args) -> None:
    """Reads, compares and writes."""
    require(len(args.runs) > 0, "no runs: name folders of runs, of studies, or tables of them")
    require(args.points > 0, f"--points {args.points}: must be at least 1")
    require(0 < args.last <= 1, f"--last {args.last}: must be above 0, and at most 1")
    require(args.output.name not in ("", ".."), f"--output {args.output}: names no file; give a name, without an ending")
    require(args.output.parent.is_dir(), f"--output {args.output}: there is no folder {args.output.parent}; make it first")
    for table in (args.output.with_name(f"{args.output.name}{ending}") for ending in (".csv", "_scores.csv")):
        read = [source for source in args.runs if Path(source).expanduser().resolve() == table.resolve()]
        require(not read, f"--output {args.output}: would replace {table}, which is read; choose another name")
    runs, problems, planned = read_runs(args.runs, args.metric)
    for problem in problems:
        print(f"*** {problem} ***")
    comparison = compare(runs, planned)
    last = max(1, round(args.last * args.points))
    raw = raw_scores(comparison, args.points, last)
    missing = comparison.missing + [line for line in problems if line.endswith(LEFT_OUT)]
    incomplete = f"{len(missing)} runs are missing, not finished or left out"
    note = incomplete if missing else ""
    beside = args.output.name
    written: dict[str, bytes] = {}

    what = args.metric.rpartition("/")[2].replace("_", " ")
    draws = [figures.curves(comparison, env_id, args.points, what) for env_id in comparison.env_ids]
    svgs = [figures.svg(draw, SIZE, env_id) for draw, env_id in zip(draws, comparison.env_ids, strict=True)]
    written["_curves.png"] = figures.png(comparison, draws, SIZE, 3)
    share = f"{last / args.points:.3g}"
    sections = [Section("", [Warned(f"{incomplete}: see below.")] if missing else [])]
    if not missing or args.allow_incomplete:
        section, written["_aggregates.png"] = aggregate_sections(args, comparison, raw, note, beside)
        sections.append(section)
    else:
        sections.append(Section("Over all games", [Warned("No aggregates: the grid is incomplete (--allow-incomplete).")]))
        args.output.with_name(f"{beside}_aggregates.png").unlink(missing_ok=True)  # of an earlier report
    words = f"Mean and 95% interval over seeds; {args.metric}, {args.points} stretches."
    drawn = Figures(figures.legend(comparison), svgs, f"{beside}_curves.png", "learning curves")
    sections += [
        Section("Learning curves", [words, drawn]),
        Section(
            "Final scores",
            [
                f"Mean over the last part of training ({share}), then mean ± standard deviation over finished runs (number).",
                score_table(comparison, raw),
            ],
        ),
    ]
    lines = comparison.missing + problems
    if lines:
        sections.append(
            Section(
                "Missing",
                [Table([["run", "what is missing"], *(list(line.partition(": ")[::2]) for line in lines)])],
            )
        )
    sections.append(Section("Made by", [Code(f"uv run {shlex.join(sys.argv)}")]))

    scores = []
    for (name, env_id), values in raw.items():
        finished = [run for run in comparison.runs[name, env_id] if run.is_finished]
        for run, score in zip(finished, values, strict=True):
            scores.append((name, env_id, run.seed, f"{score:.6g}", run.reached))
    written[".html"] = html(args.title, sections).encode()
    written[".md"] = markdown(args.title, sections).encode()
    for ending, content in written.items():
        write_whole(args.output.with_name(beside + ending), content)
    write_csv(args.output.with_name(f"{beside}_scores.csv"), ("algorithm", "env_id", "seed", "score", "step"), scores)
    if args.metric == Args.metric:
        write_table(args.output.with_name(f"{beside}.csv"), [stretches(run, args.points) for run in runs])
    endings = [*written, "_scores.csv"] + [".csv"] * (args.metric == Args.metric)
    print(f"{len(runs)} runs; written: {', '.join(f'{args.output}{ending}' for ending in sorted(endings))}")
    if missing and not args.allow_incomplete:
        for line in missing:
            print(f"missing: {line}")
        fail(f"{incomplete}: no aggregates; finish them, or add --allow-incomplete", 1)


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args)))
