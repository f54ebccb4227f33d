"""Compare runs: learning curves for each game, aggregates over games, and a list of missing runs.

    uv run experiments/report.py runs/study --output docs/study
    uv run experiments/report.py runs/*__ppo__* runs/*__deep_spi__* scores.csv wandb:my-team/deep-spi --output breakout

The inputs are folders of runs or of studies, tables written by this script or experiments/seeds.py, and Weights & Biases
projects. The outputs are `OUTPUT.html`, one self-contained page; `OUTPUT.md` and its figures; `OUTPUT.csv`, the returns of all
runs, which can be an input again; and `OUTPUT_scores.csv`, the final scores. The same command writes the same bytes.

The final score of a run is the mean over the episodes that ended in the last part of training. All intervals are 95%
intervals: by bootstrap over seeds, stratified by game (Agarwal et al., 2021), and by Student's t for learning curves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import shlex  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
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
    complete_games,
    differing_settings,
    normalized,
    raw_scores,
    unequal,
    usual_scale,
)
from experiments.study.evaluations import evaluations  # noqa: E402
from experiments.study.page import Code, Figures, Section, Table, Warned, html, markdown  # noqa: E402
from experiments.study.records import (  # noqa: E402
    COLUMNS,
    LEFT_OUT,
    RunRecord,
    check_table,
    read_runs,
    stretches,
    write_table,
)
from utils.files import write_csv, write_whole  # noqa: E402
from utils.runs.flags import parse_command, require  # noqa: E402
from utils.runs.launch import fail, run_main  # noqa: E402
from utils.runs.outputs import check_output, expand, refuse_input  # noqa: E402
from utils.statistics import RESAMPLINGS  # noqa: E402

SIZE = (3.6, 2.7)  # of a subplot, in inches
MOST_POINTS = 10_000
SCORES = ("algorithm", "env_id", "seed", "score", "step")  # columns of the table of final scores
ENDINGS = (".html", ".md", ".csv", "_scores.csv", "_curves.png", "_aggregates.png")


@dataclass
class Args:
    """Compare runs and write a report."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders of runs or of studies, tables (.csv), W&B projects (wandb:entity/project)"""
    output: Path = Path("report")
    """path of the output files, without an extension"""
    title: str = "Comparison of runs"
    """heading of the report"""
    metric: str = "charts/episodic_return"
    """metric to compare; on the gridworld, charts/init_value is the exact value of the policy"""
    points: int = 40
    """number of equal bins of steps in a run; each bin is a point of its curve and a row of the table"""
    last: float = 0.05
    """final fraction of a run whose episodes count for its final score, rounded to whole bins"""
    scale: Scale | None = None
    """common score scale (default: human for returns if known for all games, else min-max); against: divide by its mean"""
    against: str | None = None
    """reference for the probability of improvement and --scale against (default: the first algorithm, usually ppo)"""
    published: tuple[str, ...] = ()
    """published scores to draw as dotted lines, each ENV_ID=SCORE, for example Pong-v5=20.5"""
    seed: int = 0
    """seed of the bootstrap"""
    allow_incomplete: bool = False
    """compute aggregates even if runs are missing or unfinished, with a warning on their figures"""


def published_scores(typed: tuple[str, ...], env_ids: list[str]) -> dict[str, float]:
    """Return the published score of each environment in `typed`, where each is ENV_ID=SCORE.

    Raises:
        UsageError: one is malformed, or no run has that environment.
    """
    found = {}
    for text in typed:
        env_id, _, score = text.rpartition("=")
        require(env_id in env_ids, f"--published {text}: must be ENV_ID=SCORE, where ENV_ID is one of {', '.join(env_ids)}")
        try:
            found[env_id] = float(score)
        except ValueError:
            found[env_id] = np.nan
        require(bool(np.isfinite(found[env_id])), f"--published {text}: {score!r} is not a number")
    return found


def check_replaced(args: Args, runs: list[RunRecord]) -> None:
    """Check that the report's tables replace only those of an earlier report on these runs.

    Raises:
        UsageError: a file is another type of table, or contains other runs.
    """
    table, scores = (args.output.with_name(f"{args.output.name}{ending}") for ending in (".csv", "_scores.csv"))
    check_table(scores, SCORES, f"--output {args.output}")
    if args.metric == Args.metric:
        kept = {tuple(map(str, run[1:5])) for run in runs}
        rows = [tuple(row[name] for name in COLUMNS[:4]) for row in check_table(table, COLUMNS, f"--output {args.output}")]
        lost = next((" ".join(filter(None, row)) for row in rows if row not in kept), None)
        said = (
            f"--output {args.output}: would replace {table}, which has other runs ({lost}); choose another name, or delete it"
        )
        require(lost is None, said)


def score_table(comparison: Comparison, raw: dict[tuple[str, str], np.ndarray]) -> Table:
    """Return a table of the final scores: mean and standard deviation over seeds, one row per game."""

    def cell(place):
        scores, diverged = raw[place], sum(run.diverged is not None for run in comparison.runs[place])
        counts = ", ".join([str(len(scores))] * (len(scores) > 0) + [f"{diverged} diverged"] * (diverged > 0))
        spread = f" ± {scores.std(ddof=1):.3g}" if len(scores) > 1 else ""
        return (f"{scores.mean():.4g}{spread}" if len(scores) else "-") + f" ({counts})" * bool(counts)

    rows = [[env_id, *(cell((name, env_id)) for name in comparison.algorithms)] for env_id in comparison.env_ids]
    return Table([["", *comparison.algorithms], *rows])


def aggregate_sections(args: Args, comparison: Comparison, raw: dict, note: str, beside: str) -> tuple[Section, bytes]:
    """Return the section on aggregates over games, and its figure as PNG."""
    returns = args.metric == Args.metric
    scale = args.scale or (usual_scale(comparison) if returns else "min-max")
    against = comparison.algorithms[0] if args.against is None else args.against
    scores = normalized(comparison, raw, scale, against)
    found = aggregate(scores, scale, against, args.seed)
    draws = [figures.intervals(comparison, values, name) for name, values in found.statistics.items()]
    draws.append(figures.profiles(comparison, found, f"score ({scale})"))
    if found.improvement:
        what = "improvement over" if returns else "a larger value than"
        draws.append(figures.intervals(comparison, found.improvement, f"probability of {what} {against}", 0.5))
    several = {name for name, of in scores.items() if any(len(x) > 1 for x in of)}  # one seed gives no interval over seeds

    def shown(of, *names):
        value, low, high = of[names[0]]
        return f"{value:.3f}" + f" [{low:.3f}, {high:.3f}]" * (not several.isdisjoint(names))

    rows = [[name, *(shown(values, name) for values in found.statistics.values())] for name in comparison.algorithms]
    head = ["", *found.statistics]
    if found.improvement:
        head.append(f"P({'better' if returns else 'larger'} than {against})")
        rows = [[*row, shown(found.improvement, row[0], against) if row[0] in found.improvement else "-"] for row in rows]
    svgs = [figures.svg(draw, SIZE, "aggregate", note) for draw in draws]
    words = f"Scale {scale}: {SCALES[scale]}. {RESAMPLINGS:,} resamples, seed {args.seed}."
    words += " Optimality gap: lower is better." if returns else f" Scores are those of {args.metric}; larger may be worse."
    left_out = [env_id for env_id in comparison.env_ids if env_id not in complete_games(comparison, raw)]
    words += f" Left out, because an algorithm has no finished run: {', '.join(left_out)}." if left_out else ""
    drawn = Figures(figures.legend(comparison), svgs, f"{beside}_aggregates.png", "aggregates")
    section = Section("Aggregates", [words, drawn, Table([head, *rows])])
    return section, figures.png(comparison, draws, SIZE, 3, note)


def main(args: Args) -> None:
    """Read the runs, compare them, and write the report."""
    require(len(args.runs) > 0, "no runs: name folders of runs or of studies, tables, or W&B projects")
    require(0 < args.points <= MOST_POINTS, f"--points {args.points}: must be at least 1, and at most {MOST_POINTS:,}")
    require(args.seed >= 0, f"--seed {args.seed}: must be 0 or more")
    require(0 < args.last <= 1, f"--last {args.last}: must be above 0, and at most 1")
    args = replace(args, output=expand(args.output, "--output"))
    require(args.output.name not in ("", ".."), f"--output {args.output}: is not a file name; give a name without an extension")
    require(args.output.parent.is_dir(), f"--output {args.output}: folder {args.output.parent} does not exist; create it first")
    for ending in ENDINGS:
        check_output(args.output.with_name(f"{args.output.name}{ending}"), "--output")
    for table in (args.output.with_name(f"{args.output.name}{ending}") for ending in (".csv", "_scores.csv")):
        refuse_input(table, args.runs, f"--output {args.output}")
    runs, problems, planned, skipped = read_runs(args.runs, args.metric)
    for problem in problems:
        print(f"*** {problem} ***")
    check_replaced(args, runs)
    comparison = compare(runs, planned, skipped)
    if args.scale is not None and args.metric != Args.metric:
        scales = ("min-max", "against")
        require(args.scale in scales, f"--scale {args.scale}: applies to returns only; choose {' or '.join(scales)}")
    known = args.against is None or args.against in comparison.algorithms
    require(known, f"--against {args.against}: choose from {', '.join(comparison.algorithms)}")
    settings = differing_settings(comparison)
    warned = unequal(comparison, settings)
    for line in warned:
        print(f"*** {line} ***")
    last = max(1, round(args.last * args.points))
    raw = raw_scores(comparison, args.points, last)
    missing = comparison.missing + [line for line in problems if line.endswith(LEFT_OUT)]
    incomplete = f"{len(missing)} {'run is' if len(missing) == 1 else 'runs are'} missing, unfinished or skipped"
    note = incomplete if missing else ""
    beside = args.output.name
    written: dict[str, bytes] = {}

    what = args.metric.rpartition("/")[2].replace("_", " ")
    published = published_scores(args.published, comparison.env_ids)
    draws = [figures.curves(comparison, env_id, args.points, what, published.get(env_id)) for env_id in comparison.env_ids]
    svgs = [figures.svg(draw, SIZE, env_id) for draw, env_id in zip(draws, comparison.env_ids, strict=True)]
    written["_curves.png"] = figures.png(comparison, draws, SIZE, 3)
    share = f"{last / args.points:.3g}"
    top = [Warned(f"{incomplete}; see the list below.")] if missing else []
    sections = [Section("", [*top, *(Warned(f"{line}; see the settings below.") for line in warned)])]
    nothing = "" if complete_games(comparison, raw) else "no game has a finished run of every algorithm"
    if missing and not args.allow_incomplete:
        nothing = "the grid is incomplete (see --allow-incomplete)"
    if nothing:
        sections.append(Section("Aggregates", [Warned(f"No aggregates: {nothing}.")]))
        args.output.with_name(f"{beside}_aggregates.png").unlink(missing_ok=True)  # from an earlier report
    else:
        section, written["_aggregates.png"] = aggregate_sections(args, comparison, raw, note, beside)
        sections.append(section)
    words = f"Mean and 95% interval over seeds of {args.metric}, in {args.points} bins of steps."
    words += " Circle: end of an unfinished run." if any(not run.is_finished for run in runs) else ""
    words += f" Dotted line: published score ({', '.join(args.published)})." if published else ""
    drawn = Figures(figures.legend(comparison), svgs, f"{beside}_curves.png", "learning curves")
    sections += [
        Section("Learning curves", [words, drawn]),
        Section(
            "Final scores",
            [
                f"Score: mean over the final {share} of a run. Cells: mean ± standard deviation over finished runs (count).",
                score_table(comparison, raw),
            ],
        ),
    ]
    played, unread = evaluations(comparison)
    for line in unread:
        print(f"*** {line} ***")
    if played:
        words = "Games of evaluate.py after each run's last step. Cells: mean ± standard deviation over runs."
        sections.append(Section("Evaluations", [words, Table(played)]))
    if settings:
        words = "The runs differ in these settings. A dash: the default, or the algorithm has no such setting."
        sections.append(Section("Settings that differ", [words, Table(settings)]))
    lines = comparison.missing + problems + unread
    if lines:
        sections.append(
            Section(
                "Missing and damaged runs",
                [Table([["run", "problem"], *(list(line.partition(": ")[::2]) for line in lines)])],
            )
        )
    sections.append(Section("Command", [Code(f"uv run {shlex.join(sys.argv)}")]))

    scores = []
    for (name, env_id), values in raw.items():
        finished = [run for run in comparison.runs[name, env_id] if run.is_finished]
        for run, score in zip(finished, values, strict=True):
            scores.append((name, env_id, run.seed, f"{score:.6g}", run.reached))
    written[".html"] = html(args.title, sections).encode(errors="replace")  # a path may have characters without an encoding
    written[".md"] = markdown(args.title, sections).encode(errors="replace")
    for ending, content in written.items():
        write_whole(args.output.with_name(beside + ending), content)
    write_csv(args.output.with_name(f"{beside}_scores.csv"), SCORES, scores)
    if args.metric == Args.metric:
        write_table(args.output.with_name(f"{beside}.csv"), [stretches(run, args.points) for run in runs])
    endings = [*written, "_scores.csv"] + [".csv"] * (args.metric == Args.metric)
    print(f"{len(runs)} runs; written: {', '.join(f'{args.output}{ending}' for ending in sorted(endings))}")
    if missing and args.allow_incomplete and nothing:
        print(f"*** no aggregates: {nothing} ***")
    if missing and not args.allow_incomplete:
        for line in missing:
            print(f"missing: {line}")
        fail(f"{incomplete}, so nothing was aggregated; finish the runs, or add --allow-incomplete", 1)


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)))
