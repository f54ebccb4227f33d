"""Checkpoints: trees of arrays (written by orbax) beside what else is needed to go on, complete or not there at all.

    checkpoints/
      000000102400/            the step
        arrays/                trees by name: `params` alone, and `rest`
        progress.json          flags, versions, state of the log, and name, shape and type of every array
        checksums.json         SHA-256 of all other files

A checkpoint is written beside its place, under a name that ends in `.incomplete`, put on the disk, and renamed: whenever the
process dies, what has a plain number for its name is whole. What was damaged since is found by its checksums.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from utils.runs.flags import UsageError
from utils.runs.launch import FULL, one_line

FORMAT = 1
INCOMPLETE, DAMAGED = ".incomplete", ".damaged"
Trees = dict[str, Any]


class Saved(NamedTuple):
    """A checkpoint, or the final model, that was found whole."""

    path: Path
    progress: dict[str, Any]


class Damaged(Exception):
    """Something of a checkpoint is missing, or is not what was written. The text says what."""


def write_whole(path: Path, content: bytes) -> None:
    """Writes the file anew, or leaves the old one as it was."""
    partial = path.with_name(path.name + INCOMPLETE)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _to_disk(path.parent)


def write_csv(path: Path, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes a table, likewise."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_whole(path, text.getvalue().encode())


def write_json(path: Path, value: Any) -> None:
    """Writes the value as JSON, likewise."""
    write_whole(path, json.dumps(value, indent=1).encode())


def structure(trees: Trees) -> dict[str, str]:
    """Type and shape of every array, by its name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(trees)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def begin_writing(path: Path, trees: Trees, progress: dict[str, Any]) -> Callable[[], None]:
    """Copies the arrays, which may be donated from then on, and starts writing them. What it returns ends the work, wherever
    it is called: `path` is there and whole after that.

    Raises:
        OSError: it cannot be written (from the returned function too).
    """
    partial, old = (path.with_name(path.name + ending) for ending in (INCOMPLETE, ".old" + INCOMPLETE))

    def explained(error):
        shutil.rmtree(partial, ignore_errors=True)
        number = getattr(error, "errno", None) or next((n for n in FULL if os.strerror(n) in str(error)), errno.EIO)
        why = os.strerror(number) if number != errno.EIO else one_line(error)[:300]
        return OSError(number, f"the checkpoint could not be written ({why}), and the run has stopped", str(path))

    progress = progress | {"format": FORMAT, "structure": structure(trees)}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        writing = ocp.save_checkpointables_async((partial / "arrays").absolute(), trees)
    except Exception as error:
        raise explained(error) from error

    def end() -> None:
        try:
            writing.result()
            write_json(partial / "progress.json", progress)
            files = sorted(f for f in partial.rglob("*") if f.is_file())
            write_json(partial / "checksums.json", {str(f.relative_to(partial)): checksum(f) for f in files})
            for written in (*partial.rglob("*"), partial):
                _to_disk(written)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():  # the model of a run that was made longer
                os.replace(path, old)
            os.replace(partial, path)
            _to_disk(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except Exception as error:
            raise explained(error) from error

    return end


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    if path.is_file():
        with open(path, "rb+") as opened:
            os.fsync(opened.fileno())
        return
    with contextlib.suppress(OSError):  # not every system, nor every file system, does it for a folder
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def find(path: Path) -> Saved:
    """What was written there.

    Raises:
        Damaged: it is not whole.
        UsageError: another version of this code wrote it.
    """
    try:
        sums = json.loads((path / "checksums.json").read_text())
        for name, expected in sums.items():
            if checksum(path / name) != expected:
                raise Damaged(f"{name} is not what was written")
        if not {"progress.json"} < set(sums):
            raise Damaged("checksums.json lacks files")
        progress = json.loads((path / "progress.json").read_text())
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (ValueError, AttributeError, TypeError, RecursionError, NotADirectoryError, IsADirectoryError):
        raise Damaged("checksums.json is not what was written") from None
    except PermissionError:
        raise
    except OSError as error:  # a bad sector
        raise Damaged(f"{error.strerror}: {error.filename}") from None
    if progress["format"] != FORMAT:
        raise UsageError(f"{path}: another version of this code wrote it (format {progress['format']}, not {FORMAT})")
    return Saved(path, progress)


def load(saved: Saved, targets: Trees) -> Trees:
    """The trees of these names, with the structure of `targets` (arrays, or `jax.eval_shape`'s), on its devices.

    Raises:
        UsageError: what was saved has another structure, other shapes or other types: orbax would cast the last in silence.
        Damaged: it cannot be read.
    """
    written, expected = saved.progress["structure"], structure(targets)
    written = {name: kind for name, kind in written.items() if name.split("/")[0] in targets}
    for name in sorted({*written, *expected}):
        if written.get(name) != expected.get(name):
            commit = saved.progress.get("git_commit")
            raise UsageError(
                f"{saved.path}: {name} is {written.get(name, 'not there')}, and {expected.get(name, 'not there')} here: "
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
        folder: where they are.
        keep: how many to keep; 0 writes none.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.thread = self.error = None

    def steps(self) -> dict[int, Path]:
        """Path of each checkpoint, by its step, in order."""
        found = {int(path.name): path for path in self.folder.glob("[0-9]*") if path.name.isdecimal()}
        return dict(sorted(found.items()))

    def newest(self) -> tuple[Saved | None, dict[Path, str]]:
        """The last checkpoint that is whole, if there is one, and those after it, which are not, with what is wrong.

        Raises:
            UsageError: there are checkpoints, and none is whole; or another version of this code wrote them.
        """
        damaged = {}
        for path in reversed(self.steps().values()):
            try:
                return find(path), damaged
            except Damaged as error:
                damaged[path] = str(error)
        if damaged:
            raise UsageError(f"no checkpoint in {self.folder} is whole; remove that folder, and the run starts anew")
        return None, {}

    def clean(self, damaged: Iterable[Path]) -> None:
        """Removes what was not finished, and sets aside under another name what is damaged."""
        for path in self.folder.glob(f"*{INCOMPLETE}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in damaged:
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)

    def save(self, step: int, trees: Trees, progress: dict[str, Any]) -> None:
        """Starts to write a checkpoint, and removes the oldest once it is whole; waits for the one before it. The arrays may
        be donated from then on.

        Raises:
            OSError: this one or the one before it could not be written.
        """
        self.wait()
        if not self.keep:
            return
        end = begin_writing(self.folder / f"{step:012d}", trees, progress)

        def work():
            try:
                end()
                for path in list(self.steps().values())[: -self.keep]:
                    going = path.with_name(path.name + INCOMPLETE)
                    os.replace(path, going)
                    shutil.rmtree(going, ignore_errors=True)
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=work)
        self.thread.start()

    def wait(self) -> None:
        """Until the last one is whole.

        Raises:
            OSError: it could not be written.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self) -> None:
        """Raises OSError if the last one is known not to have been written."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error
