"""Checkpoints: trees of arrays (written by orbax) and everything else needed to resume. Each is complete or does not exist.

    checkpoints/
      000000102400/            the step
        arrays/                two trees: `params`, and `rest` of the state
        progress.json          flags, versions, state of the log, and name, shape and dtype of every array
        checksums.json         SHA-256 of all other files

A checkpoint is written under a name that ends in `.incomplete`, flushed to disk, and renamed. A folder whose name is only a
number is therefore complete, whenever the process died. The checksums detect later damage.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from utils.files import INCOMPLETE, to_disk, write_json
from utils.runs.flags import UsageError
from utils.runs.launch import FULL, one_line

FORMAT = 1
DAMAGED = ".damaged"
Trees = dict[str, Any]


class Saved(NamedTuple):
    """An intact checkpoint or final model."""

    path: Path
    progress: dict[str, Any]


class Damaged(Exception):
    """Part of a checkpoint is missing or differs from what was written. The message names it."""


def structure(trees: Trees) -> dict[str, str]:
    """Return dtype and shape of every array by its name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(trees)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def begin_writing(path: Path, trees: Trees, progress: dict[str, Any]) -> Callable[[], None]:
    """Copy the arrays (they may then be donated) and start writing them. Return a function that finishes the work; any thread
    may call it. When it returns, `path` exists and is intact.

    Raises:
        OSError: it cannot be written (also raised by the returned function).
    """
    partial = path.with_name(path.name + INCOMPLETE)

    def explained(error):
        shutil.rmtree(partial, ignore_errors=True)
        number = getattr(error, "errno", None) or next((n for n in FULL if os.strerror(n) in str(error)), errno.EIO)
        why = os.strerror(number) if number != errno.EIO else one_line(error)[:300]
        return OSError(number, f"run stopped: the checkpoint could not be written ({why})", str(path))

    progress = progress | {"format": FORMAT, "structure": structure(trees)}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        path.parent.mkdir(exist_ok=True)  # without its parents: the folder of a run must not appear anew
        partial.mkdir()
        write_json(partial / "progress.json", progress)
        writing = ocp.save_checkpointables_async((partial / "arrays").absolute(), trees)
    except Exception as error:
        raise explained(error) from error

    def end() -> None:
        try:
            writing.result()
            (partial / "progress.json").stat()  # orbax makes a folder anew that was moved while it writes
            files = sorted(f for f in partial.rglob("*") if f.is_file())
            write_json(partial / "checksums.json", {str(f.relative_to(partial)): checksum(f) for f in files})
            for written in (*partial.rglob("*"), partial):
                to_disk(written)
            shutil.rmtree(path, ignore_errors=True)  # the model of a run that was extended: its checkpoint is there
            os.replace(partial, path)
            to_disk(path.parent)
        except Exception as error:
            raise explained(error) from error

    return end


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def find(path: Path) -> Saved:
    """Find the checkpoint at `path` and verify its checksums.

    Raises:
        Damaged: part of it is missing or differs from what was written.
        UsageError: another version of this code wrote it.
    """
    try:
        sums = json.loads((path / "checksums.json").read_text())
        for name, expected in sums.items():
            if checksum(path / name) != expected:
                raise Damaged(f"{name} does not match its checksum")
        if not {"progress.json"} < set(sums):
            raise Damaged("checksums.json is incomplete")
        progress = json.loads((path / "progress.json").read_text())
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (ValueError, AttributeError, TypeError, RecursionError, NotADirectoryError, IsADirectoryError):
        raise Damaged("checksums.json is not valid") from None
    except PermissionError:
        raise
    except OSError as error:  # such as a bad sector
        raise Damaged(f"{error.strerror}: {error.filename}") from None
    if progress["format"] != FORMAT:
        raise UsageError(f"{path}: has format {progress['format']}, not {FORMAT}; use the version of this code that wrote it")
    return Saved(path, progress)


def load(saved: Saved, targets: Trees) -> Trees:
    """Return the saved trees with the names, structure and devices of `targets` (arrays, or outputs of `jax.eval_shape`).

    Raises:
        UsageError: the saved structure, shapes or dtypes differ. (Orbax would silently cast dtypes.)
        Damaged: it cannot be read.
    """
    written, expected = saved.progress["structure"], structure(targets)
    written = {name: kind for name, kind in written.items() if name.split("/")[0] in targets}
    for name in sorted({*written, *expected}):
        if written.get(name) != expected.get(name):
            commit = saved.progress.get("git_commit")
            raise UsageError(
                f"{saved.path}: {name} is {written.get(name, 'missing')}, expected {expected.get(name, 'nothing')}; "
                f"use the code that wrote it{f', commit {commit}' if commit else ''}"
            )
    device = SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device)  # noqa: E731
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            return ocp.load_checkpointables((saved.path / "arrays").absolute(), jax.tree.map(place, targets))
    except Exception as error:
        raise Damaged(one_line(error)[:300]) from error


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: their folder.
        keep: how many to keep; 0 writes none.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def steps(self) -> dict[int, Path]:
        """Return the path of each checkpoint by its step, in ascending order."""
        found = {int(path.name): path for path in self.folder.glob("[0-9]*") if path.name.isdecimal()}
        return dict(sorted(found.items()))

    def newest(self) -> tuple[Saved | None, dict[Path, str]]:
        """Return the last intact checkpoint, or None, and the damage found in each later one.

        Raises:
            UsageError: all checkpoints are damaged, or another version of this code wrote them.
        """
        damaged = {}
        for path in reversed(self.steps().values()):
            try:
                return find(path), damaged
            except Damaged as error:
                damaged[path] = str(error)
        if damaged:
            raise UsageError(f"{self.folder}: all checkpoints are damaged; remove this folder to start the run from scratch")
        return None, {}

    def clean(self, damaged: Iterable[Path]) -> None:
        """Remove unfinished checkpoints, and rename damaged ones to `*.damaged`."""
        for path in self.folder.glob(f"*{INCOMPLETE}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in damaged:
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)

    def save(self, step: int, trees: Trees, progress: dict[str, Any]) -> None:
        """Wait for the previous checkpoint, and start writing this one. Once it is written, the oldest is removed. The arrays
        may be donated after this.

        Raises:
            OSError: this checkpoint or the previous one could not be written.
        """
        self.wait()
        if not self.keep:
            return
        end = begin_writing(self.folder / f"{step:012d}", trees, progress)

        def work():
            end()
            for path in list(self.steps().values())[: -self.keep]:
                going = path.with_name(path.name + INCOMPLETE)
                os.replace(path, going)
                shutil.rmtree(going, ignore_errors=True)

        self.writing = self.thread.submit(work)

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            OSError: it could not be written.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise OSError if writing the last checkpoint is known to have failed."""
        if self.writing is not None and self.writing.done():
            self.wait()
