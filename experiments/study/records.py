"""Read the scores of runs from their folders, from tables written earlier, or from Weights & Biases."""

import codecs
import contextlib
import csv
import importlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from envs.own import short
from envs.registry import family
from experiments.study.plan import LOGS, LONG, PLAN, RUNNERS, SHORT, TRIALS, WORKER, args_of, read_plan
from experiments.study.slurm import JOBS
from utils.files import write_csv
from utils.runs.flags import RunArgs, UsageError, defaults, parse_flags, require
from utils.runs.folder import CHECKPOINTS, MODEL, RECORD, read_record
from utils.runs.logs import METRICS
from utils.runs.outputs import expand
from utils.runs.stored_flags import renewed, to_store, typed_settings

COLUMNS = ("script", "env_id", "flags", "seed", "planned_steps", "step", "episodic_return", "episodes")
OF_EPISODES = ("charts/episodic_return", "charts/episodic_length")  # in every row in which an episode ended
WEIGHTED = (*OF_EPISODES, "charts/human_normalized_score", "charts/relative_improvement")  # means over `charts/episodes`
WANDB = "wandb:"
LEFT_OUT = "; skipped"  # ends the message about a run that is not in the comparison
LAUNCHED = {f"--{flag}" for flag in RUNNERS}  # flags of a planned command that do not affect results
DAMAGED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)  # errors that bad JSON causes


class RunRecord(NamedTuple):
    """The scores of a run. `source` names it in messages; `flags` are its non-default flags, as on the command line. Commit,
    uncommitted changes (`dirty`) and versions are those of its last session. What is unknown is None."""

    source: str
    script: str
    env_id: str
    flags: str
    seed: int
    planned: int  # steps of the complete run
    step: Int[np.ndarray, " K"]  # after each update, or bin of updates
    value: Float[np.ndarray, " K"]  # mean over the episodes that ended there; NaN if none did
    weight: Float[np.ndarray, " K"]  # number of these episodes
    commit: str | None = None
    dirty: bool | None = None
    versions: dict[str, str] | None = None
    extended: str | None = None  # "no", or the steps of its earlier, shorter schedules
    diverged: int | None = None  # the step at which a loss or a parameter was not finite

    @property
    def is_finished(self) -> bool:
        """Return True if the run has made all its steps, and the last one gave finite numbers."""
        return self.reached >= self.planned and self.diverged is None

    @property
    def reached(self) -> int:
        """Return the last step of the run."""
        return int(self.step[-1])


class Unread(NamedTuple):
    """The identity of a run that is not compared. The fields are those of a `RunRecord`."""

    source: str
    script: str
    env_id: str
    flags: str
    seed: int


class Reading(NamedTuple):
    """The runs that were read.

    Attributes:
        runs: runs to compare.
        problems: one line for each skipped run or damaged file.
        planned: runs of the studies that have no folder.
        skipped: runs that have a folder, a row or an entry, but cannot be compared. Those of unknown identity are not listed.
    """

    runs: list[RunRecord]
    problems: list[str]
    planned: list[Unread] = []
    skipped: list[Unread] = []


def args_of_script(script: str) -> type:
    """Return the class that declares the flags of a script, by its name in a run's record or in a table. Reading a study makes
    its own scripts importable.

    Raises:
        Exception: of any type; a script of your own may be gone, or raise anything.
    """
    return importlib.import_module(LONG.get(script, script)).Args


def typed_flags(script: str, flags: dict[str, Any]) -> str:
    """Return a run's flags that affect its results and differ from its environment's defaults, as on the command line. If the
    script cannot be imported, the defaults are unknown: return all flags that affect the results."""
    try:
        args_type = args_of_script(script)
        default = defaults(args_type, flags["env_id"])
    except Exception:
        args_type, default = RunArgs, None
    return " ".join(typed_settings(renewed(flags, default or ()), args_type, default))


def split_flags(flags: str) -> list[str]:
    """Split the flags of a `RunRecord` into one string per flag, each with its values."""
    return [word for word in re.split(r" (?=--)", flags) if word]


def _unread(source: str, script: str, flags: dict[str, Any]) -> Unread:
    return Unread(source, SHORT.get(script, script), short(flags["env_id"]), typed_flags(script, flags), int(flags["seed"]))


def _record(source: str, script: str, flags: dict[str, Any], rows: list[tuple], sitting: Any = None) -> RunRecord:
    batch = flags["num_envs"] * flags["num_steps"]
    planned = flags["total_timesteps"] // batch * batch
    step, value, weight = (np.array(column, float) for column in zip(*rows, strict=True))
    sitting = sitting if isinstance(sitting, dict) else {}
    commit, dirty, versions = (sitting.get(name) for name in ("git_commit", "git_dirty", "versions"))
    code = commit and str(commit), dirty, versions if isinstance(versions, dict) else None
    return RunRecord(*_unread(source, script, flags), planned, step.astype(int), value, weight, *code)


def _stored_elsewhere(path: Path) -> dict[str, Any] | None:
    """Return script and flags of a run whose run.json is damaged, from its model or a checkpoint."""
    for place in (path / MODEL, *sorted(path.glob(f"{CHECKPOINTS}/*"), reverse=True)):
        with contextlib.suppress(OSError, *DAMAGED):
            progress = json.loads((place / "progress.json").read_text())
            return {name: progress[name] for name in ("script", "flags")}
    return None


def identify(path: Path) -> Unread | None:
    """Return the identity of the run in a folder, or None if it is unknown."""
    with contextlib.suppress(OSError, *DAMAGED):
        record = None
        with contextlib.suppress(OSError):
            record = read_record(path)
        stored = record or _stored_elsewhere(path)
        return stored and _unread(str(path), stored["script"], stored["flags"])
    return None


def _point(metric: str, step: Any, value: Any, episodes: Any) -> tuple[int, float, float]:
    """Return step, value and weight of a logged update, for a `RunRecord`. W&B stores NaN as a string."""
    value = np.nan if value is None else float(value)
    weight = float(episodes) if metric in WEIGHTED else 1.0
    return int(step), value, weight if np.isfinite(value) else 0.0


def read_folder(path: Path, metric: str) -> tuple[RunRecord | None, list[str]]:
    """Read a run from its folder. Return it (None if it is unreadable) and a list of problems."""
    try:
        record = read_record(path)
    except OSError as error:
        return None, [f"{path}: {RECORD} cannot be read ({error.strerror}){LEFT_OUT}"]
    if record is None:
        return None, [f"{path}: {RECORD} is missing or damaged{LEFT_OUT}"]
    try:
        lines = (path / METRICS).read_bytes().splitlines()
    except OSError as error:
        return None, [f"{path}: {METRICS} cannot be read ({error.strerror}){LEFT_OUT}"]
    rows, bad = [], 0
    for line in lines:
        try:
            row = json.loads(line)
            rows.append(_point(metric, row["step"], row.get(metric), row.get("charts/episodes", 1.0)))
        except DAMAGED:
            bad += 1
    problems = [f"{path}: {bad} of {len(lines)} rows of {METRICS} are damaged and ignored"] * (bad > 0)
    if not rows:
        return None, [*problems, f"{path}: {METRICS} has no {metric} yet{LEFT_OUT}"]
    rows = sorted({row[0]: row for row in rows}.values())
    try:
        run = _record(str(path), record["script"], record["flags"], rows, (record["sittings"] or [None])[-1])
        past = run.step <= run.planned  # a longer run counts from its first checkpoint on
        run = run._replace(step=run.step[past], value=run.value[past], weight=run.weight[past])
        lost = record.get("finished_at", 0) > run.reached
        absent = run.reached // (record["flags"]["num_envs"] * record["flags"]["num_steps"]) - len(rows) - bad
    except DAMAGED:
        return None, [*problems, f"{path}: {RECORD} is not from a run of these scripts{LEFT_OUT}"]
    extended = ", ".join(f"{steps:,}" for steps in record.get("extended_from", []))
    diverged = record.get("diverged_at")
    diverged = diverged if diverged and run.reached <= diverged else None  # else it was resumed, and got beyond
    run = run._replace(extended=f"from {extended} steps" if extended else "no", diverged=diverged)
    if absent > 0:
        problems.append(f"{path}: {absent} of {len(rows) + bad + absent} rows of {METRICS} are missing")
    if lost:
        said = f"{METRICS} ends at step {run.reached:,} although the run is finished; it counts as unfinished"
        problems.append(f"{path}: {said}")
    if not (run.weight > 0).any():
        said = f"no episode ended in its {run.reached:,} steps" if metric in OF_EPISODES else f"{METRICS} has no {metric}"
        said = said if run.is_finished else f"{METRICS} has no {metric} yet"
        return None, [*problems, f"{path}: {said}{LEFT_OUT}"]
    return run, problems


def table_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the names of a table's columns, and its rows. Spreadsheets may have added a byte order mark (UTF-8 or UTF-16), and
    may have replaced commas by semicolons or tabs. With semicolons, numbers may have decimal commas.

    Raises:
        UsageError: the file cannot be read, or is not a table.
    """
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
        head = text.partition("\n")[0]
        separator = max(",;\t", key=head.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        rows = list(reader)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not a table of runs ({error})") from None
    for row in rows if separator == ";" else []:
        row |= {name: row[name].replace(",", ".") for name in COLUMNS[-2:] if row.get(name)}
    return list(reader.fieldnames or ()), rows


def check_table(path: Path, columns: Iterable[str], flag: str) -> list[dict[str, str]]:
    """Check that a table to be written replaces nothing, or a table of the same columns, and return that one's rows.

    Raises:
        UsageError: the file is something else. `flag`, which sets it, begins the message.
    """
    try:
        names, rows = table_rows(path) if path.exists() else ([*columns], [])
    except UsageError:
        names, rows = [], []
    require(names == [*columns], f"{flag}: would replace {path}, which has other columns; choose another name, or delete it")
    return rows


def read_table(path: Path) -> list[RunRecord]:
    """Read the runs of a table written by `write_table` or experiments/seeds.py.

    Raises:
        UsageError: the file is not such a table.
    """
    names, rows = table_rows(path)
    lacking = [name for name in COLUMNS if name not in names]
    require(not lacking, f"{path}: is not a table of runs (no column {', '.join(lacking)})")
    runs: dict[tuple[str, ...], list[tuple]] = {}
    for number, row in enumerate(rows, 2):
        key = tuple(row[name] for name in COLUMNS[:5])
        try:
            complete = None not in (row[name] for name in COLUMNS)
            value = float(row["episodic_return"]) if row["episodic_return"] else np.nan
            step, weight = int(row["step"]), float(row["episodes"] or 0)
            whole = complete and int(row["seed"]) >= 0 and int(row["planned_steps"]) > 0 and step >= 0
            whole = whole and 0 <= weight < np.inf and (weight == 0 or bool(np.isfinite(value)))
        except (ValueError, TypeError):
            whole = False
        require(whole, f"{path}: line {number} is damaged; delete it, or write the table again")
        runs.setdefault(key, []).append((step, value, weight))
    found = []
    for (script, env_id, flags, seed, planned), points in runs.items():
        step, value, weight = (np.array(column, float) for column in zip(*sorted(points), strict=True))
        source = f"{path}, {' '.join(filter(None, (script, flags)))}, {env_id}, seed {seed}"
        found.append(RunRecord(source, script, env_id, flags, int(seed), int(planned), step.astype(int), value, weight))
    return found


def read_wandb(project: str, metric: str) -> Reading:
    """Read the runs of a Weights & Biases project, `entity/project`.

    Raises:
        UsageError: the project cannot be read.
    """
    import wandb

    found, problems, skipped = [], [], []
    try:
        for run in wandb.Api().runs(project):
            source = f"{WANDB}{project}/{run.id}"
            # scan_history returns only rows with all keys, so read all updates first, then those in which an episode ended
            rows = {row["global_step"]: (row["global_step"], np.nan, 0.0) for row in run.scan_history(keys=["global_step"])}
            try:
                for row in run.scan_history(keys=["global_step", metric, "charts/episodes"]):
                    rows[row["global_step"]] = _point(metric, row["global_step"], row[metric], row["charts/episodes"])
            except DAMAGED:
                raise UsageError(f"--metric {metric}: is not a number in {source}; choose another metric") from None
            if not any(weight > 0 for *_, weight in rows.values()):
                problems.append(f"{source}: has no {metric}{LEFT_OUT}")
                with contextlib.suppress(*DAMAGED):
                    skipped.append(_unread(source, run.config["script"], dict(run.config)))
                continue
            try:
                one = _record(source, run.config["script"], dict(run.config), sorted(rows.values()), dict(run.config))
                diverged = getattr(run, "summary", {}).get("diverged_at")
                found.append(one._replace(diverged=diverged and int(diverged)))
            except DAMAGED:
                problems.append(f"{source}: its config is not from a run of these scripts{LEFT_OUT}")
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UsageError(f"{WANDB}{project}: cannot be read ({' '.join(str(error).split())}); see `wandb login`") from None
    return Reading(found, problems, [], skipped)


def planned_runs(logdir: Path) -> dict[str, Unread]:
    """Return the identity of each run that a study has planned, by the name of its folder.

    Raises:
        UsageError: the study's plan is damaged.
    """
    parsed: dict[tuple, tuple[str, str]] = {}

    def parse(path: Path, env_id: str, typed: list[str]) -> tuple[str, str]:
        name = SHORT.get(path.stem, path.stem)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                args = parse_flags(args_of(path), [f"--env-id={env_id}", *typed])
            return name, typed_flags(path.stem, to_store(args))
        except (Exception, SystemExit):  # the script is gone, or no longer has one of the flags
            return " ".join([name, *typed]), ""

    found = {}
    for run in read_plan(logdir):
        path, typed = Path(run.command[1]), [word for word in run.command[2:] if word.partition("=")[0] not in LAUNCHED]
        kind = path, family(run.env_id), *typed  # the environments of a family share their defaults
        if kind not in parsed:
            parsed[kind] = parse(path, run.env_id, typed)
        script, flags = parsed[kind]
        found[run.name] = Unread(str(logdir / run.name), script, run.env_id, flags, run.seed)
    return found


def _read_folders(path: Path, metric: str) -> Reading:
    """Read a run's folder, or all runs in the folder of a study."""
    if any(os.path.lexists(path / name) for name in (RECORD, METRICS)):
        folders, planned, problems = [path], {}, []
    else:
        try:
            inside = sorted(
                x
                for x in path.iterdir()
                if x.is_dir() and x.name not in (LOGS, JOBS, TRIALS) and not x.name.startswith((".", WORKER))
            )
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        studies = [one for one in inside if os.path.lexists(one / PLAN)]
        problems = [f"{one}: is the folder of a study; name it too to compare its runs" for one in studies]
        folders, planned = [one for one in inside if one not in studies], {}
        if os.path.lexists(path / PLAN):
            try:
                planned = planned_runs(path)  # before the runs are read: it makes own scripts importable
            except UsageError as error:
                problems.append(f"{error}; missing runs are unknown")
        require(len(folders) + len(planned) > 0, f"{path}: contains no folders of runs")
    runs, skipped = [], []
    for one in folders:
        run, wrong = read_folder(one, metric)
        problems += wrong
        if run is None:
            skipped.append(identify(one) or planned.get(one.name))
        else:
            runs.append(run)
    absent = [planned[name] for name in planned if name not in {one.name for one in folders}]
    return Reading(runs, problems, absent, [run for run in skipped if run is not None])


def read_runs(sources: Iterable[str], metric: str) -> Reading:
    """Read all runs of the sources: folders of runs or of studies, tables (.csv), W&B projects (`wandb:entity/project`).

    Raises:
        UsageError: a source is none of these, or cannot contain the metric.
    """
    found = []
    for source in sources:
        path = expand(source)
        try:
            is_file, is_folder = path.is_file(), path.is_dir() and source != ""  # an empty name would be the current folder
        except OSError as error:
            raise UsageError(f"{source}: cannot be read ({error.strerror})") from None
        if source.startswith(WANDB):
            found.append(read_wandb(source.removeprefix(WANDB), metric))
        elif is_file:
            require(metric == OF_EPISODES[0], f"{path}: tables contain only returns, not {metric}; name folders")
            table = read_table(path)
            empty = [run for run in table if not (run.weight > 0).any()]
            problems = [f"{run.source}: no episode ended in its {run.reached:,} steps{LEFT_OUT}" for run in empty]
            whole = [run for run in table if (run.weight > 0).any()]
            found.append(Reading(whole, problems, [], [Unread(*run[:5]) for run in empty]))
        elif is_folder:
            found.append(_read_folders(path, metric))
        else:
            raise UsageError(f"{source or repr(source)}: no such folder or table")
    runs, problems, planned, skipped = ([one for reading in found for one in reading[i]] for i in range(4))
    return Reading(sorted(runs, key=lambda run: (run.env_id, run.script, run.flags, run.seed)), problems, planned, skipped)


def flag_name(word: str) -> str:
    """Return the name of a flag as typed, such as `gamma` for `--gamma 0.9` and `norm-adv` for `--no-norm-adv`."""
    return re.split(r"[ =]", re.sub(r"^--(no-)?", "", word), maxsplit=1)[0]


def labels(runs: list[RunRecord], unread: list[Unread] = ()) -> list[str]:
    """Return the name of each run's algorithm: its script, and the flags in which the runs of that script differ. The names of
    `unread` runs follow; their flags count too, so that a name does not depend on which runs exist.

    Raises:
        UsageError: two runs have the same name, environment and seed.
    """
    every = [*runs, *unread]
    words = [split_flags(run.flags) for run in every]
    # compare within an environment: different defaults between families do not make another algorithm
    seen: dict[tuple[str, str], list[set[str]]] = {}
    for run, own in zip(every, words, strict=True):
        seen.setdefault((run.script, run.env_id), []).append(set(own))
    differing: dict[str, set[str]] = {}
    for (script, _), sets in seen.items():
        differing.setdefault(script, set()).update(map(flag_name, set.union(*sets) - set.intersection(*sets)))
    names = [
        " ".join([run.script, *(word for word in own if flag_name(word) in differing[run.script])])
        for run, own in zip(every, words, strict=True)
    ]
    counted = Counter((name, run.env_id, run.seed) for name, run in zip(names, runs, strict=False))
    for (name, env_id, seed), number in counted.items():
        if number > 1:
            same = [
                run.source for n, run in zip(names, runs, strict=False) if (n, run.env_id, run.seed) == (name, env_id, seed)
            ]
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


def last_tenth(run: RunRecord) -> float:
    """Return the `final_score` over the last tenth of a run."""
    return final_score(run, 10, 1)


def write_table(path: Path, runs: list[RunRecord]) -> None:
    """Write a row for each bin of the runs; on an error, the old file stays as it is. The last bin of a run that diverged in
    its last update is left out, so that the table does not call the run finished."""
    rows = []
    for run in runs:
        first = (run.script, run.env_id, run.flags, run.seed, run.planned)
        whole = len(run.step) - (run.diverged is not None and run.reached >= run.planned)
        for step, value, weight in list(zip(run.step, run.value, run.weight, strict=True))[:whole]:
            rows.append((*first, step, f"{value:.6g}" if weight > 0 else "", f"{weight:.6g}"))
    write_csv(path, COLUMNS, rows)
