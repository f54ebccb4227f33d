"""The runs of a study, scripts x environments x seeds, and how far each of them is.

Nothing but the folders of the runs, and what each has printed, says where a study stands: `state_of` reads them.
"""

import ast
import dataclasses
import hashlib
import importlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock

from envs.confounding_gridworld import ENV_ID as GRIDWORLD
from envs.minatar import GAMES as MINATAR
from envs.registry import family
from utils.runs import folder
from utils.runs.checkpoints import write_json
from utils.runs.flags import UsageError, check_flags, parse_flags, require
from utils.runs.logs import METRICS
from utils.runs.scores import ale57, ale61
from utils.runs.stored_flags import check_continued

SHORT = {"ppo_atari_envpool_xla_jax_scan": "ppo"}  # what a script is called in names and tables, where not as its file
ATARI5 = ("BattleZone", "DoubleDunk", "NameThisGame", "Phoenix", "Qbert")  # Aitchison et al. (2023), arXiv 2210.02019
SETS = {name: tuple(f"{g}-v5" for g in games) for name, games in (("ale57", ale57()), ("ale61", ale61()), ("atari5", ATARI5))}
SETS |= {"minatar": tuple(MINATAR), "gridworld": (GRIDWORLD,)}
RUNNERS = ("env-id", "seed", "logdir", "run-name", "resume")  # flags that whoever starts the runs gives
RECORD = "study.json"
LOGS = "logs"
BEGAN, ENDED = "=== begins", "=== ended with exit code"  # lines of a log around what a run has printed
TAIL_BYTES = 20_000
LONGEST = 120  # characters of flags in a name, of which file systems allow 255


class PlannedRun(NamedTuple):
    """A run of a study."""

    name: str  # of its folder
    script: str  # as it is called in tables: file and flags of its own
    env_id: str
    seed: int
    steps: int  # what it makes when it is finished
    command: list[str]


class Progress(NamedTuple):
    """How far a run is.

    left: not started. running: a process is at work. stopped: it can go on. failed: its last process ended with an error.
    """

    kind: Literal["left", "running", "stopped", "failed", "finished"]
    step: int = 0
    elapsed: float = 0.0  # seconds of training, all sittings together
    episodic_return: float | None = None  # of the last update in which an episode ended
    error: str = ""  # the last line of what failed


def trains(path: Path) -> bool:
    """Whether the file is a training script: it calls `run_script`."""
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(isinstance(func, ast.Name) and func.id == "run_script" for func in calls)


def script_path(word: str) -> Path:
    """The file of a script, from its name with or without .py, its short name, or a path to a file of another folder.

    Raises:
        UsageError: there is none.
    """
    stem = {short: long for long, short in SHORT.items()}.get(word, word.removesuffix(".py"))
    known = {p.stem: p for p in folder.ROOT.glob("*.py") if trains(p)}
    own = Path(word).expanduser().absolute()
    if own.suffix == ".py" and own.is_file() and own.parent != folder.ROOT:
        taken = any((folder.ROOT / place / own.name).exists() for place in ("", "benchmarks", "experiments"))
        require(not taken, f"--scripts {word}: is called as one of this project's; give it a name of its own")
        known[stem] = own
    names = ", ".join(sorted(SHORT.get(stem, stem) for stem in known))
    require(stem in known, f"--scripts {word}: no such script; there are {names}, and any like them")
    return known[stem]


def args_of(path: Path) -> type:
    """The flags of a script, the class `Args` in its file.

    Raises:
        UsageError: there is none.
    """
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    args_type = getattr(importlib.import_module(path.stem), "Args", None)
    require(args_type is not None, f"--scripts {path}: has no class Args of flags, as the other scripts have")
    return args_type


def slug(flags: list[str]) -> str:
    """Flags as part of a file's name: cut off where they are many, and told apart by a digest."""
    text = re.sub(r"[^A-Za-z0-9.+-]+", "-", " ".join(flags).replace("_", "-")).strip("-")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def plan(
    scripts: tuple[str, ...], env_ids: tuple[str, ...], seeds: list[int], flags: list[str], logdir: Path
) -> list[PlannedRun]:
    """All runs of a study: the seeds one after the other, so that an unfinished study compares what it has.

    Args:
        scripts: each a script and flags of its own, in one string.
        env_ids: environments, or names of `SETS`.
        seeds: one run for each.
        flags: further flags of all runs.
        logdir: the folder of the study.

    Raises:
        UsageError: the first mistake found in any of the flags, or a run in that folder that was made with others.
    """
    require(len(scripts) > 0, "--scripts: name at least one")
    env_ids = tuple(dict.fromkeys(one for name in env_ids for one in SETS.get(name, (name,))))
    require(len(env_ids) > 0, "--env-ids: name at least one")
    found = []
    for text in scripts:
        try:
            word, *own = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"--scripts {text!r}: {str(error).lower() or 'is empty'}") from None
        path = script_path(word)
        for given in (*own, *flags):
            given = given.replace("_", "-").partition("=")[0]
            own_flag = given.startswith("--") and given.removeprefix("--") in RUNNERS
            require(not own_flag, f"{given}: this program gives it to each run; see --env-ids, --num-seeds, --logdir")
        name = "__".join(filter(None, (SHORT.get(path.stem, path.stem), slug(own))))
        found.append((path, name, own))
    names = [name for _, name, _ in found]
    twice = {name for name in names if names.count(name) > 1}
    require(not twice, f"--scripts: names {', '.join(twice)} twice")
    parsed, runs = {}, []
    for seed in seeds:
        for env_id in env_ids:
            for path, script, own in found:
                more, kind = [*own, *flags], (script, family(env_id))
                if kind not in parsed:  # the environments of a family share their defaults
                    parsed[kind] = parse_flags(args_of(path), [f"--env-id={env_id}", *more])
                name = f"{env_id}__{script}__{seed}"
                of_run = {"env_id": env_id, "seed": seed, "logdir": str(logdir), "run_name": name, "resume": "auto"}
                args = dataclasses.replace(parsed[kind], **of_run)
                check_flags(args)
                record = folder.read_record(logdir / name)
                if record is not None:
                    check_continued(args, record["flags"], f"{logdir / name}")
                batch = args.num_envs * args.num_steps
                steps = args.total_timesteps // batch * batch
                given = [f"--{flag.replace('_', '-')}={value}" for flag, value in of_run.items()]
                if args.track and args.wandb_group is None and "WANDB_RUN_GROUP" not in os.environ:
                    given.append(f"--wandb-group={env_id}__{script}")
                runs.append(PlannedRun(name, script, env_id, seed, steps, [sys.executable, str(path), *given, *more]))
    return runs


def write_plan(logdir: Path, runs: list[PlannedRun]) -> None:
    """Adds the runs to what the folder says that the study consists of, for `read_plan`."""
    known = {run.name: run for run in (read_plan(logdir) if (logdir / RECORD).exists() else [])}
    known |= {run.name: run for run in runs}
    logdir.mkdir(parents=True, exist_ok=True)
    write_json(logdir / RECORD, {"runs": [run._asdict() for run in known.values()]})


def read_plan(logdir: Path) -> list[PlannedRun]:
    """All runs that were ever asked for in that folder.

    Raises:
        UsageError: it is no study's.
    """
    try:
        return [PlannedRun(**run) for run in json.loads((logdir / RECORD).read_text())["runs"]]
    except FileNotFoundError:
        raise UsageError(f"--logdir {logdir}: there is no study ({RECORD}); name the folder of one") from None
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"{logdir / RECORD}: is damaged; remove it, and type the command that launched the study") from None


def claim(logdir: Path) -> Any:
    """Makes the study this process's own to launch, until it ends; returns what holds it.

    Raises:
        UsageError: another process launches its runs.
    """
    logdir.mkdir(parents=True, exist_ok=True)
    try:
        return folder.claim(logdir)
    except UsageError:
        raise UsageError(f"--logdir {logdir}: another process launches its runs; wait for its end, or see --status") from None


def log_path(logdir: Path, name: str) -> Path:
    """What a run has printed, over all processes that worked at it."""
    return logdir / LOGS / f"{name}.log"


def tail(path: Path) -> list[str]:
    """The last lines of a file, the first of which may be cut; none if there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole row of metrics.jsonl, and the last return in the rows before it."""
    last, returned = {}, None
    for line in tail(path):
        try:
            row = json.loads(line)
            last = row if isinstance(row["step"], int) else last
            returned = row.get("charts/episodic_return", returned)
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
    return last | {"charts/episodic_return": returned}


def is_at_work(path: Path) -> bool:
    """Whether a process, on whatever machine, is at work at the run in that folder."""
    if not (path / folder.LOCK).exists():
        return False
    try:
        with filelock.FileLock(path / folder.LOCK, timeout=0, fallback_to_soft=False, preserve_lock_file=True):
            return False
    except filelock.Timeout:
        return True
    except (NotImplementedError, OSError):  # a file system without locks
        return False


def state_of(logdir: Path, run: PlannedRun) -> Progress:
    """How far a run is."""
    path = logdir / run.name
    record = folder.read_record(path)
    row = _last_row(path / METRICS)
    done = Progress("stopped", row.get("step", 0), row.get("elapsed", 0.0), row["charts/episodic_return"])
    if record is not None and record.get("finished_at", 0) >= run.steps:
        return done._replace(kind="finished")
    if is_at_work(path):
        return done._replace(kind="running")
    lines = [line.strip() for line in tail(log_path(logdir, run.name)) if line.strip()]
    if lines and lines[-1].startswith(ENDED):
        code = int(lines[-1].removeprefix(ENDED).split()[0])
        if code not in (0, *STOPPED):
            began = max((i for i, line in enumerate(lines) if line.startswith(BEGAN)), default=-1)
            said = [line.strip("│╭╰─╮╯ ") for line in lines[began + 1 : -1] if not line.startswith("│ For full helptext")]
            errors = [line for line in said if line.startswith("error:")] or [line for line in said if line]
            # what a signal has ended had no time to say why
            why = [f"exit code {code}", *errors[-1:]] if code < 128 else [f"exit code {code}: signal {code - 128}"]
            return done._replace(kind="failed", error=": ".join(why))
    return done if record is not None else Progress("left")


STOPPED = (129, 130, 143)  # exit codes of a run that was asked to stop, and has saved


def rates(runs: list[PlannedRun], states: dict[str, Progress]) -> dict[tuple[str, str], float]:
    """Steps per second of each script in each environment, as its runs made them (starts and compilation included)."""
    made: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        state = states[run.name]
        if state.elapsed > 0:
            made.setdefault((run.script, run.env_id), []).append(state.step / state.elapsed)
    return {key: sum(values) / len(values) for key, values in made.items()}


def seconds_left(runs: list[PlannedRun], states: dict[str, Progress], rate: dict[tuple[str, str], float]) -> float | None:
    """Of one run after the other; None where no run of a script has been measured."""
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
