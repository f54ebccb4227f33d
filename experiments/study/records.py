"""Read the scores of runs from their folders, from tables written earlier, or from Weights & Biases."""

import csv
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from jaxtyping import Float, Int

from experiments.study.grid import LOGS, SHORT, PlannedRun, read_plan
from experiments.study.grid import RECORD as STUDY
from experiments.study.slurm import JOBS
from utils.runs.checkpoints import write_csv
from utils.runs.flag_types import MAY_CHANGE, as_typed
from utils.runs.flags import RunArgs, UsageError, annotations_of, defaults, require
from utils.runs.folder import RECORD, read_record
from utils.runs.logs import METRICS

COLUMNS = ("script", "env_id", "flags", "seed", "planned_steps", "step", "episodic_return", "episodes")
OF_EPISODES = ("charts/episodic_return", "charts/episodic_length")  # metrics averaged over `charts/episodes`
WANDB = "wandb:"
LEFT_OUT = "; skipped"  # ends the message about a run that is not in the comparison


class RunRecord(NamedTuple):
    """The scores of a run. `source` names it in messages; `flags` are its non-default flags, as on the command line."""

    source: str
    script: str
    env_id: str
    flags: str
    seed: int
    planned: int  # steps of the complete run
    step: Int[np.ndarray, " K"]  # after each update, or bin of updates
    value: Float[np.ndarray, " K"]  # mean over the episodes that ended there; NaN if none did
    weight: Float[np.ndarray, " K"]  # number of these episodes

    @property
    def is_finished(self) -> bool:
        """Return True if the run has made all its steps."""
        return self.reached >= self.planned

    @property
    def reached(self) -> int:
        """Return the last step of the run."""
        return int(self.step[-1])


class Reading(NamedTuple):
    """Runs, one line for each skipped run or damaged file, and the runs that the studies have planned."""

    runs: list[RunRecord]
    problems: list[str]
    planned: list[PlannedRun] = []


def typed_flags(script: str, flags: dict[str, Any]) -> str:
    """Return a run's flags that affect its results and differ from its environment's defaults, as on the command line. If the
    script is not on Python's path, the defaults are unknown: return all flags that affect the results."""
    try:
        args_type = importlib.import_module(script).Args
        default = defaults(args_type, flags["env_id"])
    except (ImportError, AttributeError):
        args_type, default = RunArgs, {}
    hints = get_type_hints(args_type, include_extras=True)
    said = []
    for name, value in flags.items():
        may_change = name in hints and MAY_CHANGE in annotations_of(hints[name])
        if name in ("env_id", "seed") or name.startswith("wandb_") or may_change:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if name in (default or flags) and (name not in default or value != default[name]):
            said.append(as_typed(name, value))
    return " ".join(said)


def split_flags(flags: str) -> list[str]:
    """Split the flags of a `RunRecord` into one string per flag, each with its values."""
    return [word for word in re.split(r" (?=--)", flags) if word]


def _record(source: str, script: str, flags: dict[str, Any], rows: list[tuple]) -> RunRecord:
    batch = flags["num_envs"] * flags["num_steps"]
    planned = flags["total_timesteps"] // batch * batch
    step, value, weight = (np.array(column, float) for column in zip(*rows, strict=True))
    name = SHORT.get(script, script)
    typed = typed_flags(script, flags)
    return RunRecord(source, name, flags["env_id"], typed, flags["seed"], planned, step.astype(int), value, weight)


def read_folder(path: Path, metric: str) -> tuple[RunRecord | None, list[str]]:
    """Read a run from its folder. Return it (None if it is unreadable) and a list of problems."""
    record = read_record(path)
    if record is None:
        return None, [f"{path}: {RECORD} is missing or damaged; skipped"]
    try:
        lines = (path / METRICS).read_bytes().splitlines()
    except OSError as error:
        return None, [f"{path}: {METRICS} cannot be read ({error.strerror}); skipped"]
    rows, bad = [], 0
    for line in lines:
        try:
            row = json.loads(line)
            value = row.get(metric)
            weight = row.get("charts/episodes", 1.0) if metric in OF_EPISODES else 1.0
            rows.append((int(row["step"]), np.nan if value is None else float(value), 0.0 if value is None else float(weight)))
        except (ValueError, LookupError, TypeError, AttributeError):
            bad += 1
    problems = [f"{path}: {bad} of {len(lines)} rows of {METRICS} are damaged and ignored"] * (bad > 0)
    if not any(weight > 0 for *_, weight in rows):
        return None, [*problems, f"{path}: {METRICS} has no {metric} yet; skipped"]
    rows = sorted({row[0]: row for row in rows}.values())
    try:
        return _record(str(path), record["script"], record["flags"], rows), problems
    except (LookupError, TypeError):
        return None, [*problems, f"{path}: {RECORD} is not from a run of these scripts; skipped"]


def read_table(path: Path) -> list[RunRecord]:
    """Read the runs of a table written by `write_table` or experiments/seeds.py.

    Raises:
        UsageError: the file is not such a table.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: is not a table of runs ({error})") from None
    lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    require(not lacking, f"{path}: is not a table of runs (no column {', '.join(lacking)})")
    runs: dict[tuple[str, ...], list[tuple]] = {}
    for number, row in enumerate(rows, 2):
        key = tuple(row[name] for name in COLUMNS[:5])
        try:
            value = float(row["episodic_return"]) if row["episodic_return"] else np.nan
            runs.setdefault(key, []).append((int(row["step"]), value, float(row["episodes"] or 0)))
            int(row["seed"]), int(row["planned_steps"])
        except (ValueError, TypeError):
            raise UsageError(f"{path}: line {number} is damaged; delete it, or write the table again") from None
    found = []
    for (script, env_id, flags, seed, planned), points in runs.items():
        step, value, weight = (np.array(column, float) for column in zip(*sorted(points), strict=True))
        source = f"{path}: {script} {env_id} {seed}"
        found.append(RunRecord(source, script, env_id, flags, int(seed), int(planned), step.astype(int), value, weight))
    return found


def read_wandb(project: str, metric: str) -> Reading:
    """Read the runs of a Weights & Biases project, `entity/project`.

    Raises:
        UsageError: the project cannot be read.
    """
    import wandb

    found, problems = [], []
    try:
        for run in wandb.Api().runs(project):
            source = f"{WANDB}{project}/{run.id}"
            # scan_history returns only rows with all keys, so read all updates first, then those in which an episode ended
            rows = {row["global_step"]: (row["global_step"], np.nan, 0.0) for row in run.scan_history(keys=["global_step"])}
            for row in run.scan_history(keys=["global_step", metric, "charts/episodes"]):
                weight = row["charts/episodes"] if metric in OF_EPISODES else 1.0
                rows[row["global_step"]] = (row["global_step"], row[metric], weight if np.isfinite(row[metric]) else 0.0)
            if not any(weight > 0 for *_, weight in rows.values()):
                problems.append(f"{source}: has no {metric}; skipped")
                continue
            try:
                found.append(_record(source, run.config["script"], dict(run.config), sorted(rows.values())))
            except (LookupError, TypeError):
                problems.append(f"{source}: its config is not from a run of these scripts; skipped")
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UsageError(f"{WANDB}{project}: cannot be read ({' '.join(str(error).split())}); see `wandb login`") from None
    return Reading(found, problems)


def read_runs(sources: Iterable[str], metric: str) -> Reading:
    """Read all runs of the sources: folders of runs or of studies, tables (.csv), W&B projects (`wandb:entity/project`).

    Raises:
        UsageError: a source is none of these, or cannot contain the metric.
    """
    runs, problems, planned = [], [], []
    for source in sources:
        path = Path(source).expanduser()
        if source.startswith(WANDB):
            found = read_wandb(source.removeprefix(WANDB), metric)
            runs, problems = runs + found.runs, problems + found.problems
        elif path.is_file():
            require(metric == OF_EPISODES[0], f"{path}: tables contain only returns; leave out --metric, or name folders")
            runs += read_table(path)
        elif path.is_dir():
            of_run = any((path / name).exists() for name in (RECORD, METRICS))
            folders = [path] if of_run else sorted(x for x in path.iterdir() if x.is_dir() and x.name not in (LOGS, JOBS))
            require(len(folders) > 0, f"{path}: contains no folders of runs")
            planned += read_plan(path) if (path / STUDY).exists() else []
            for one in folders:
                run, wrong = read_folder(one, metric)
                runs, problems = runs + [run] * (run is not None), problems + wrong
        else:
            raise UsageError(f"{source}: no such folder or table")
    return Reading(sorted(runs, key=lambda run: (run.env_id, run.script, run.flags, run.seed)), problems, planned)


def labels(runs: list[RunRecord]) -> list[str]:
    """Return the name of each run's algorithm: its script, and the flags in which the runs of that script differ.

    Raises:
        UsageError: two runs have the same name, environment and seed.
    """
    words = [split_flags(run.flags) for run in runs]
    flag = lambda word: re.sub(r"^--(no-)?", "", word).split()[0]  # noqa: E731
    # compare within an environment: different defaults between families do not make another algorithm
    seen: dict[tuple[str, str], list[set[str]]] = {}
    for run, own in zip(runs, words, strict=True):
        seen.setdefault((run.script, run.env_id), []).append(set(own))
    differing: dict[str, set[str]] = {}
    for (script, _), sets in seen.items():
        differing.setdefault(script, set()).update(map(flag, set.union(*sets) - set.intersection(*sets)))
    names = [
        " ".join([run.script, *(word for word in own if flag(word) in differing[run.script])])
        for run, own in zip(runs, words, strict=True)
    ]
    counted = Counter((name, run.env_id, run.seed) for name, run in zip(names, runs, strict=True))
    for (name, env_id, seed), number in counted.items():
        if number > 1:
            same = [run.source for n, run in zip(names, runs, strict=True) if (n, run.env_id, run.seed) == (name, env_id, seed)]
            raise UsageError(f"{' and '.join(same)} are duplicates: {name} on {env_id}, seed {seed}; name only one")
    return names


def stretches(run: RunRecord, points: int, whole: int | None = None) -> RunRecord:
    """Average a run over bins of equal length, `points` in `whole` steps (default: the planned steps). Each value is the mean
    over the episodes that ended in the bin. The last bin may be incomplete."""
    edges = np.ceil(np.arange(1, points + 1) * (whole or run.planned) / points).astype(int)
    index = np.searchsorted(edges, run.step)  # edges[i - 1] < step <= edges[i]
    index = np.minimum(index, points - 1)
    number = int(index.max()) + 1
    weight = np.bincount(index, run.weight, number)
    total = np.bincount(index, np.where(run.weight > 0, np.nan_to_num(run.value), 0.0) * run.weight, number)
    value = np.divide(total, weight, out=np.full(number, np.nan), where=weight > 0)
    step = np.minimum(edges[:number], max(run.reached, 1))
    return run._replace(step=step, value=value, weight=weight)


def final_score(run: RunRecord, points: int, last: int) -> float:
    """Return the mean over the episodes that ended in the last `last` of a run's `points` bins; if there are none, in the last
    bin that has some. The score is computed from bins, so that a table of bins gives the same score as the run's folder."""
    run = stretches(run, points)
    inside = (np.arange(len(run.step)) >= len(run.step) - last) & (run.weight > 0)
    if not inside.any():
        inside = np.arange(len(run.step)) == np.flatnonzero(run.weight > 0)[-1]
    return float(np.average(run.value[inside], weights=run.weight[inside]))


def write_table(path: Path, runs: list[RunRecord]) -> None:
    """Write a row for each bin of the runs; on an error, the old file stays as it is."""
    rows = []
    for run in runs:
        first = (run.script, run.env_id, run.flags, run.seed, run.planned)
        for step, value, weight in zip(run.step, run.value, run.weight, strict=True):
            rows.append((*first, step, f"{value:.6g}" if weight > 0 else "", f"{weight:.6g}"))
    write_csv(path, COLUMNS, rows)
