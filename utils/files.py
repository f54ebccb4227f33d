"""Write files atomically: a reader sees the old content or the new, never a part."""

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock

INCOMPLETE = ".incomplete"  # ends the name of a file or folder that is being written


def write_whole(path: Path, content: bytes) -> None:
    """Replace the file atomically. If that fails, the old file is unchanged."""
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
    to_disk(path.parent)


def csv_text(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a CSV table as text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def write_csv(path: Path, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV table atomically."""
    write_whole(path, csv_text(head, rows).encode())


def without_locks(error: Exception) -> bool:
    """Return True if the error of a lock means that its file system has none."""
    return getattr(error, "errno", errno.ENOSYS) in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on the file, so that several processes can read, extend, and replace it in turn. A file system without locks
    gives none."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        if not without_locks(error):
            raise
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Write the value as JSON atomically."""
    write_whole(path, json.dumps(value, indent=1).encode())


def to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if path.is_file():
        with open(path, "rb+") as opened:
            os.fsync(opened.fileno())
        return
    with contextlib.suppress(OSError):  # some systems and file systems cannot sync a folder
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
