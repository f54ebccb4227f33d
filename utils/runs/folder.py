"""A run's folder: its location, its lock, and run.json, which records how the run was made."""

import contextlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from inspect import getfile
from pathlib import Path
from typing import Any

import filelock
import jax

from envs import own
from envs.registry import file_name
from utils.files import INCOMPLETE, without_locks
from utils.runs.flags import UsageError
from utils.runs.logs import METRICS
from utils.runs.outputs import expand
from utils.runs.stored_flags import to_store

RECORD, LOCK, OWNER, CHECKPOINTS, MODEL = "run.json", ".lock", ".process", "checkpoints", "model"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "flashbax", "envpool", "numpy", "pgx", "pgx-minatar")
ROOT = Path(__file__).parents[2]
CODE = ("envs", "networks", "utils")  # packages that scripts import
ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE")  # set in git's hooks: another repository
GIT_SECONDS = 10
IDENTITY = ("name", "algorithm", "script", "seed", "flags")  # entries of `describe_run` that every checkpoint stores too
OPTIONAL = ("extended_from", "wandb")  # entries that it stores if they exist


def lasting(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a run's record that every checkpoint stores too, from the record or from a checkpoint."""
    return {name: entries[name] for name in (*IDENTITY, *OPTIONAL) if name in entries}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def _git(*words: str) -> str:
    """Return what git says of the repository of this code.

    Raises:
        OSError: git is not installed, or takes too long.
        subprocess.CalledProcessError: git fails.
    """
    env = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words], cwd=ROOT, env=env, capture_output=True, timeout=GIT_SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"git {words[0]} takes longer than {GIT_SECONDS} s") from None
    return os.fsdecode(done.stdout).strip()


def git_commit() -> dict[str, Any]:
    """Return the commit of this code, and whether tracked files have changed since.

    Both are None without a repository of this project: one around an unpacked copy is another project's. If git fails, both are
    None too, and a line says why.
    """
    unknown = {"git_commit": None, "git_dirty": None}
    if not (ROOT / ".git").exists():  # a file in a worktree, else a folder
        return unknown
    try:
        if not os.path.samefile(_git("rev-parse", "--show-toplevel"), ROOT):
            return unknown
        dirty = bool(_git("status", "--porcelain", "--untracked-files=no"))
        return {"git_commit": _git("rev-parse", "HEAD"), "git_dirty": dirty}
    except OSError as error:
        why = "git is not installed; install it" if error.filename == "git" else str(error)
    except subprocess.CalledProcessError as error:
        said = os.fsdecode(error.stderr).strip().splitlines() or [f"git has exit code {error.returncode}"]
        why = said[0].removeprefix("fatal: ")
        if "safe.directory" in os.fsdecode(error.stderr):
            why += f"; run: {shlex.join(['git', 'config', '--global', '--add', 'safe.directory', str(ROOT)])}"
    print(f"*** run.json will not have the commit of this code: {why} ***")
    return unknown


def describe_sitting(step: int) -> dict[str, Any]:
    """Return the entry of run.json for a session: one process that works on the run from `step` on."""
    device = jax.devices()[0]
    return {
        "from_step": step,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "device": f"{device.platform}: {device.device_kind}",
        "host": socket.gethostname(),
        "process": os.getpid(),
        "versions": versions(),
    } | git_commit()


def describe_run(args: Any, algorithm: str, name: str) -> dict[str, Any]:
    """Return the entries of run.json for a new run."""
    script = Path(getfile(type(args))).stem
    return {"name": name, "algorithm": algorithm, "script": script, "seed": args.seed, "flags": to_store(args)}


def code_files(args: Any) -> dict[str, Path]:
    """Return the code of a run, by name: the script that declares the flags, the file of
    your own environment, and this project's modules and lock file."""
    script, own_env = Path(getfile(type(args))), own.source(args.env_id)
    paths = [*ROOT.glob("*.py"), *(path for name in CODE for path in (ROOT / name).rglob("*.py")), ROOT / "requirements.lock"]
    ours = {str(path.relative_to(ROOT)): path for path in paths if path.is_file()}
    return {path.name: path for path in (script, own_env) if path} | ours


def locate(args: Any, algorithm: str) -> tuple[Path, Path | None]:
    """Return the folder of the run that the flags name, which may not exist, and the checkpoint in it if they name one.

    Raises:
        UsageError: --resume names neither a run folder nor a checkpoint.
    """
    if args.resume in ("never", "auto"):
        name = args.run_name or f"{file_name(args.env_id)}__{algorithm}__{args.seed}__{int(time.time())}"
        return expand(args.logdir, "--logdir") / name, None
    path = expand(args.resume, "--resume")
    if (path / RECORD).is_file() or (path / CHECKPOINTS).is_dir():
        return path, None
    if path.is_dir() and path.name.isdecimal() and path.absolute().parent.name == CHECKPOINTS:
        return path.absolute().parents[1], path.absolute()
    raise UsageError(f"--resume {args.resume}: neither a run folder nor a checkpoint; see --logdir, or use --resume auto")


def is_new(folder: Path) -> bool:
    """Return True if there is nothing to keep: the folder does not exist, or its run has not logged any update."""
    if not folder.is_dir():
        return not folder.exists()
    left_over = {LOCK, OWNER, RECORD, RECORD + INCOMPLETE}
    if (folder / RECORD).exists():
        left_over |= {path.name for path in folder.glob("events.out.tfevents.*")}
        left_over |= {path.name for path in folder.glob(METRICS) if path.stat().st_size == 0}
    return {path.name for path in folder.iterdir()} <= left_over


def clear(folder: Path) -> None:
    """Remove the files of a run that has not logged anything."""
    for path in folder.iterdir():
        if path.name not in (LOCK, OWNER):
            path.unlink()


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the contents of run.json, or None if it is missing or damaged."""
    try:
        record = json.loads((folder / RECORD).read_text())
        texts = [record["name"], record["algorithm"], record["script"]]
        wandb = record.get("wandb")
        if wandb is not None:
            texts += [wandb["id"], wandb["project"], wandb["entity"] or ""]
        numbers = [record["seed"], record.get("finished_at", 0), record.get("diverged_at", 0), *record.get("extended_from", [])]
        numbers += [wandb["logged_to"]] if wandb else []
        whole = isinstance(record["flags"], dict) and isinstance(record["sittings"], list)
        whole = whole and all(isinstance(x, str) for x in texts) and all(isinstance(x, int) for x in numbers)
        return record if whole else None
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def copied_from(wandb: dict[str, Any], folder: Path) -> Path | None:
    """Return the run folder of which this one is a copy, or None: the W&B run in its record belongs to a folder that still
    exists elsewhere."""
    other = Path(wandb.get("folder", folder))
    record = None if other.absolute() == folder.absolute() else read_record(other)
    same = record is not None and (record.get("wandb") or {}).get("id") == wandb["id"]
    return other if same and not os.path.samefile(other, folder) else None


def claim(folder: Path) -> filelock.BaseFileLock:
    """Lock the run for this process. The lock is released when the process ends, even if it is killed.

    Raises:
        UsageError: another process holds the lock.
    """
    # no soft lock: its file would outlive a killed process
    lock = filelock.FileLock(folder / LOCK, fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire(timeout=1.0)  # a process that only checks the lock holds it briefly
    except filelock.Timeout:
        try:
            whose = (folder / OWNER).read_text()
        except OSError:
            whose = "another process"
        raise UsageError(f"{folder}: in use by {whose}; wait for it to end, or choose another --run-name") from None
    except (NotImplementedError, OSError) as error:
        if not without_locks(error):
            raise
        print(f"*** the file system of {folder} has no locks; make sure that only one process uses the run ***")
    (folder / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock


def command_to_resume(args: Any, folder: Path, *more: str) -> str:
    """Return the command that resumes a run with its original flags, or starts it again if it has no checkpoints."""
    words, typed = [], list(sys.argv[1:])
    dropped = {"--resume"} if args.keep_checkpoints else {"--resume", "--run-name"}
    while typed:
        word = typed.pop(0)
        flag, equals, _ = word.partition("=")
        if flag.replace("_", "-") in dropped:
            typed = typed if equals else typed[1:]
        else:
            words.append(word)
    if args.keep_checkpoints:
        words += ["--resume", "auto" if args.run_name else str(folder)]
    return shlex.join(["uv", "run", sys.argv[0], *words, *more])
