"""Check output files before the work: a folder that cannot be written is an error in the first second, not after hours."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from utils.files import INCOMPLETE
from utils.runs.flags import UsageError, require


def expand(path: str | Path, flag: str = "") -> Path:
    """Return the path with `~` expanded. `flag` begins the error message.

    Raises:
        UsageError: `~name` is not the home of a user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = str(path).partition("/")[0]
        raise UsageError(f"{f'{flag} {path}'.strip()}: {home} is no home folder; write out the path") from None


def check_output(path: str | Path, flag: str, make_parent: bool = False) -> Path:
    """Return the path of a file to write, with `~` expanded.

    Args:
        path: the file.
        flag: the flag that sets it, for the error message.
        make_parent: make its folder if it does not exist.

    Raises:
        UsageError: the file cannot be written.
    """
    typed, path = f"{flag} {path}", expand(path, flag)
    require(path.name not in ("", ".."), f"{typed}: is not a file name; add one")
    try:
        if make_parent:
            path.parent.mkdir(parents=True, exist_ok=True)
        require(path.parent.is_dir(), f"{typed}: folder {path.parent} does not exist; create it first")
        require(path.is_file() or not path.exists(), f"{typed}: is not a regular file; choose another name")
        # files are written under another name and renamed, so the folder must be writable
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=INCOMPLETE):
            pass
    except OSError as error:
        raise UsageError(f"{typed}: cannot be written ({error.strerror}); name another file with {flag}") from None
    return path


def refuse_input(path: Path, inputs: Iterable[str], typed: str) -> None:
    """Refuse to write a file that is one of the inputs. `typed` begins the error message.

    Raises:
        UsageError: it is one.
    """
    same = any(os.path.realpath(expand(source)) == os.path.realpath(path) for source in inputs)
    require(not same, f"{typed}: would overwrite {path}, which is an input; choose another name")
