"""The runs of a study (scripts x environments x seeds), and the progress of each.

Only the run folders and the logs store the progress of a study; `state_of` reads them.
"""

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from envs.atari_scores import ale57, ale61
from envs.confounding_gridworld import ENV_ID as GRIDWORLD
from envs.minatar import GAMES as MINATAR
from envs.own import absolute, short
from envs.registry import family, file_name
from utils.files import write_json
from utils.runs import folder
from utils.runs.flags import UsageError, check_flags, parse_flags, require
from utils.runs.logs import METRICS
from utils.runs.outputs import expand
from utils.runs.stored_flags import check_continued, slug

SHORT = {"ppo_atari_envpool_xla_jax_scan": "ppo"}  # short names of scripts, for run names and tables
LONG = {short: long for long, short in SHORT.items()}
ATARI5 = ("BattleZone", "DoubleDunk", "NameThisGame", "Phoenix", "Qbert")  # Aitchison et al. (2023), arXiv 2210.02019
SETS = {name: tuple(f"{g}-v5" for g in games) for name, games in (("ale57", ale57()), ("ale61", ale61()), ("atari5", ATARI5))}
SETS |= {"minatar": tuple(MINATAR), "gridworld": (GRIDWORLD,)}
RUNNERS = ("env-id", "seed", "logdir", "run-name", "resume")  # flags that the launcher sets
PLAN, SEARCH = "study.json", "search.json"  # files in the folder of a study, and of a search
LOGS = "logs"
TRIALS, WORKER = "trials", "worker-"  # folders in that of a search which are no runs: its trials, and (first letters) its jobs
BEGAN, ENDED = "=== begins", "=== ended with exit code"  # log lines around the output of a process
TAIL_BYTES = 20_000


class PlannedRun(NamedTuple):
    """A run of a study."""

    name: str  # also of its folder
    script: str  # as shown in tables: file name and its own flags
    env_id: str
    seed: int
    steps: int  # of the complete run
    command: list[str]


class Progress(NamedTuple):
    """The progress of a run.

    left: not started. running: a process is running it. stopped: it can be resumed. failed: its last process had an error.
    """

    kind: Literal["left", "running", "stopped", "failed", "finished"]
    step: int = 0
    elapsed: float = 0.0  # seconds of training, over all sessions
    episodic_return: float | None = None  # of the last update in which an episode ended
    error: str = ""  # last error line of a failed run


def trains(path: Path) -> bool:
    """Return True if the file is a training script, that is, if it calls `run_script`."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # no Python, or a draft
        return False
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(func, ast.Name) and func.id == "run_script" for func in calls)


def script_path(word: str) -> Path:
    """Return the file of a script, given its name with or without .py, its short name, or a path in another folder.

    Raises:
        UsageError: there is no such script, or its name is taken by a script of this project.
    """
    stem = LONG.get(word, word.removesuffix(".py"))
    known = {p.stem: p for p in folder.ROOT.glob("*.py") if trains(p)}
    own = expand(word, "script").absolute()
    if own.suffix == ".py" and own.is_file() and own.parent != folder.ROOT:
        taken = any((folder.ROOT / place / own.name).exists() for place in ("", "benchmarks", "experiments"))
        require(not taken, f"{word}: has the name of one of this project's scripts; rename it")
        beside = [path for name in folder.CODE for path in (own.with_name(f"{name}.py"), own.with_name(name) / "__init__.py")]
        hides = next((path.relative_to(own.parent).parts[0] for path in beside if path.exists()), None)
        require(hides is None, f"{word}: {hides} in its folder hides this project's; rename that, or move the script")
        known[stem] = own
    names = ", ".join(sorted(SHORT.get(stem, stem) for stem in known))
    require(stem in known, f"{word}: no such script; choose from {names}, or the path of a .py file")
    return known[stem]


def args_of(path: Path) -> type:
    """Return the class `Args` of a script, which declares its flags.

    Raises:
        UsageError: the script has no such class.
    """
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        args_type = getattr(importlib.import_module(path.stem), "Args", None)
    except (Exception, SystemExit) as error:  # an own script may raise anything
        said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise UsageError(f"{path}: cannot be imported ({said})") from None
    require(dataclasses.is_dataclass(args_type), f"{path}: has no dataclass Args; declare the flags in one")
    return args_type


def python_path() -> str:
    """Return the PYTHONPATH of runs: scripts in other folders find this project's packages, and what the launcher finds."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(folder.ROOT), *(os.path.abspath(entry) for entry in given if entry)])


def to_paste(command: list[str]) -> str:
    """Return a command that starts Python with a script, for a shell in any folder."""
    own = Path(command[1]).parent != folder.ROOT
    return shlex.join([*(["env", f"PYTHONPATH={python_path()}"] if own else []), *command])


def without_sets(env_ids: tuple[str, ...]) -> tuple[str, ...]:
    """Return the environments, each once, with the names of `SETS` replaced by what they contain.

    Raises:
        UsageError: there are none.
    """
    found = {absolute(one): one for name in env_ids for one in SETS.get(name, (name,))}
    require(len(found) > 0, "--env-ids: name at least one")
    return tuple(found.values())


def plan(
    scripts: tuple[str, ...], env_ids: tuple[str, ...], seeds: list[int], flags: list[str], logdir: Path, prefix: str = ""
) -> list[PlannedRun]:
    """Return all runs of a study, ordered by seed, so that an unfinished study has complete seeds to compare.

    Args:
        scripts: each a script and its own flags, in one string.
        env_ids: environments, or names of `SETS`.
        seeds: one run for each.
        flags: more flags, for all runs.
        logdir: the folder of the study.
        prefix: begins the names of the runs.

    Raises:
        UsageError: a flag is wrong, or a run in the folder was made with other flags.
    """
    require(len(scripts) > 0, "--scripts: name at least one")
    env_ids = without_sets(env_ids)
    found = []
    for text in scripts:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"--scripts {text!r}: {str(error).lower()}") from None
        require(len(words) > 0, f"--scripts {text!r}: is empty; name a script")
        word, *own = words
        path = script_path(word)
        given = next((flag for flag in RUNNERS if flag in named([*own, *flags])), None)
        require(given is None, f"--{given}: is set for each run; leave it out, and choose --env-ids, seeds and --logdir")
        both = " and ".join(f"--{flag}" for flag in sorted(named(own) & named(flags)))
        require(not both, f"--scripts {text!r}: {both} is also given after --, for all runs; give it in one place")
        name = "__".join(filter(None, (SHORT.get(path.stem, path.stem), slug(own))))
        found.append((path, name, own))
    names = [name for _, name, _ in found]
    twice = {name for name in names if names.count(name) > 1}
    require(not twice, f"--scripts: names {', '.join(twice)} twice; name each once")
    parsed, runs, taken = {}, [], {}
    for seed in seeds:
        for env_id in env_ids:
            for path, script, own in found:
                more, kind = [*own, *flags], (script, family(env_id))
                if kind not in parsed:  # the environments of a family share their defaults
                    parsed[kind] = parse_flags(args_of(path), [f"--env-id={env_id}", *more])
                name = f"{prefix}{file_name(env_id)}__{script}__{seed}"
                both = f"{taken.get(name)} and {env_id} give runs of one name, {name}; use a study for each"
                require(name not in taken, f"--env-ids: {both}")
                taken[name] = env_id
                of_run = {"env_id": absolute(env_id), "seed": seed, "logdir": str(logdir), "run_name": name, "resume": "auto"}
                args = dataclasses.replace(parsed[kind], **of_run)
                check_flags(args)
                record = folder.read_record(logdir / name)
                if record is not None:
                    check_continued(args, record["flags"], f"{logdir / name}", "choose another --logdir")
                batch = args.num_envs * args.num_steps
                steps = args.total_timesteps // batch * batch
                given = [f"--{flag.replace('_', '-')}={value}" for flag, value in of_run.items()]
                one = "WANDB_RUN_ID: would make all runs of the study one W&B run; unset it, or leave out --track"
                require(not args.track or "WANDB_RUN_ID" not in os.environ, one)
                runs.append(PlannedRun(name, script, short(env_id), seed, steps, [sys.executable, str(path), *given, *more]))
    return runs


def named(words: list[str]) -> set[str]:
    """Return the names of the flags among the words of a command line; `norm-adv` for `--no-norm-adv`."""
    typed = (word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    return {name.removeprefix("--").removeprefix("no-") for name in typed}


def count_extended(logdir: Path, runs: list[PlannedRun]) -> int:
    """Return how many of the runs are finished, but with fewer steps than planned now."""
    records = ((run, folder.read_record(logdir / run.name)) for run in runs)
    return sum(0 < (record or {}).get("finished_at", 0) < run.steps for run, record in records)


def write_plan(logdir: Path, runs: list[PlannedRun]) -> None:
    """Add the runs to the folder's list of planned runs, which `read_plan` reads."""
    known = {run.name: run for run in planned_in(logdir)}
    known |= {run.name: run for run in runs}
    logdir.mkdir(parents=True, exist_ok=True)
    write_json(logdir / PLAN, {"runs": [run._asdict() for run in known.values()]})


def read_plan(logdir: Path) -> list[PlannedRun]:
    """Return all runs ever planned in the folder.

    Raises:
        UsageError: it is not the folder of a study, or its list is damaged.
    """
    try:
        runs = [PlannedRun(**run) for run in json.loads((logdir / PLAN).read_text())["runs"]]
        words = [word for run in runs for word in (run.name, run.script, run.env_id, *run.command)]
        numbers = [number for run in runs for number in (run.seed, run.steps)]
        whole = all(len(run.command) > 1 and run.name and run.steps > 0 for run in runs)
        if whole and all(isinstance(word, str) for word in words) and all(isinstance(number, int) for number in numbers):
            return runs
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"--logdir {logdir}: contains no study ({PLAN}); name the folder of a study") from None
    except OSError as error:
        raise UsageError(f"{logdir / PLAN}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise UsageError(f"{logdir / PLAN}: is damaged; delete it, and repeat the command that launched the study")


def planned_in(logdir: Path) -> list[PlannedRun]:
    """Return all runs ever planned in the folder; none if it contains no study.

    Raises:
        UsageError: the study's list is damaged.
    """
    return read_plan(logdir) if (logdir / PLAN).exists() else []


def claim(logdir: Path) -> Any:
    """Lock the study until this process ends, so that no other process launches its runs. Return the lock.

    Raises:
        UsageError: another process has the lock.
    """
    logdir.mkdir(parents=True, exist_ok=True)
    try:
        return folder.claim(logdir)
    except UsageError:
        raise UsageError(f"--logdir {logdir}: another process is running this study; wait for it, or use --status") from None


def log_path(logdir: Path, name: str) -> Path:
    """Return the path of a run's log, which contains the output of all its sessions."""
    return logdir / LOGS / f"{name}.log"


def tail(path: Path) -> list[str]:
    """Return the last lines of a file (the first may be truncated), or none if there is no file or it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _last_row(path: Path) -> dict[str, Any]:
    """Return step and elapsed seconds of the last intact row of metrics.jsonl, and the last return logged up to it."""
    last, returned = {"step": 0, "elapsed": 0.0}, None
    for line in tail(path):
        try:
            row = json.loads(line)
            last = {"step": int(row["step"]), "elapsed": float(row.get("elapsed", 0.0))}
            returned = float(row.get("charts/episodic_return", returned))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
    return last | {"charts/episodic_return": returned}


def is_at_work(path: Path) -> bool:
    """Return True if a process, on any machine, is running the run in the folder. Reading the folder suffices to find out."""
    lock = path / folder.LOCK
    if not lock.exists():
        return False
    try:
        if fcntl is None:
            with filelock.FileLock(lock, timeout=0, fallback_to_soft=False, preserve_lock_file=True):
                return False
        with lock.open("rb") as file:  # a shared lock needs no right to write, and closing the file releases it
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except (filelock.Timeout, BlockingIOError):
        return True
    except (NotImplementedError, OSError):  # a file system without locks
        return False


def state_of(logdir: Path, run: PlannedRun) -> Progress:
    """Return the progress of a run."""
    path = logdir / run.name
    record, unreadable = None, ""
    try:
        record = folder.read_record(path)
    except OSError as error:
        unreadable = f"{folder.RECORD} cannot be read ({error.strerror})"
    row = _last_row(path / METRICS)
    done = Progress("stopped", row["step"], row["elapsed"], row["charts/episodic_return"])
    if record is not None and record.get("finished_at", 0) >= run.steps:
        return done._replace(kind="finished")
    if is_at_work(path):
        return done._replace(kind="running")
    if unreadable:
        return done._replace(kind="failed", error=unreadable)
    lines = [line.strip() for line in tail(log_path(logdir, run.name)) if line.strip()]
    ended = re.match(rf"{ENDED} (\d+)", lines[-1]) if lines else None
    if ended:
        code = int(ended[1])
        if code not in (0, *STOPPED):
            began = max((i for i, line in enumerate(lines) if line.startswith(BEGAN)), default=-1)
            said = [line.strip("│╭╰─╮╯ ") for line in lines[began + 1 : -1] if not line.startswith("│ For full helptext")]
            errors = [line for line in said if line.startswith("error:")] or [line for line in said if line]
            # a process that a signal ended has printed no reason
            why = [f"exit code {code}", *errors[-1:]] if code < 128 else [f"exit code {code}: signal {code - 128}"]
            return done._replace(kind="failed", error=": ".join(why))
    if record is not None and record.get("diverged_at"):  # with --no-stop-if-not-finite
        return done._replace(kind="failed", error=f"not finite at step {record['diverged_at']:,}")
    return done if record is not None else Progress("left")


STOPPED = (129, 130, 143)  # exit codes of a run that saved and stopped on a signal


def rates(runs: list[PlannedRun], states: dict[str, Progress]) -> dict[tuple[str, str], float]:
    """Return the steps per second of each script in each environment, measured by its runs (compilation included)."""
    made: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        state = states[run.name]
        if state.elapsed > 0 and state.step > 0:
            made.setdefault((run.script, run.env_id), []).append(state.step / state.elapsed)
    return {key: sum(values) / len(values) for key, values in made.items()}


def seconds_left(runs: list[PlannedRun], states: dict[str, Progress], rate: dict[tuple[str, str], float]) -> float | None:
    """Return the seconds left if runs execute one at a time; None if no speed is known for a script."""
    total = 0.0
    for run in runs:
        state = states[run.name]
        if state.kind == "finished":
            continue
        per_second = rate.get((run.script, run.env_id)) or next(
            (value for (script, _), value in rate.items() if script == run.script), None
        )
        if per_second is None:
            return None
        total += max(0, run.steps - state.step) / per_second
    return total
