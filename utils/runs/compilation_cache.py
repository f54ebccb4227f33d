"""Persistent cache of compiled programs."""

import contextlib
import glob
import hashlib
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import filelock
import jax

MOST_BYTES = 2**30  # of all cached programs for a type of machine; the least recently used are removed first
UNREADABLE = "Error reading persistent compilation cache entry"  # begins JAX's warning
shown = warnings.showwarning
LOCK, PROGRAM, USED = ".lockfile", "-cache", "-atime"  # how JAX names its files


def keep_compiled() -> None:
    """Make JAX cache programs that take a second or more to compile, in ~/.cache/deep-spi (or under XDG_CACHE_HOME). JAX's own
    variables take precedence: JAX_COMPILATION_CACHE_DIR sets the folder, JAX_ENABLE_COMPILATION_CACHE=0 disables the cache.

    If the folder cannot be used, print a line and cache nothing. A damaged program is removed and compiled again; see `repair`.
    """
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")  # JAX compiles the program anyway
    warnings.filterwarnings("always", UNREADABLE)
    if warnings.showwarning is not show_warning:
        global shown
        shown, warnings.showwarning = warnings.showwarning, show_warning
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "deep-spi" / kind_of_machine()
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / LOCK, timeout=1.0):
            remove_unfinished(folder)
            (folder / ".probe").write_bytes(b"0")
            (folder / ".probe").unlink()
    except (OSError, RuntimeError, filelock.Timeout) as error:  # read-only, full, no home, a file system without locks
        why = getattr(error, "strerror", None) or error
        print(f"*** compiled programs are not cached: {folder}: {why}; set JAX_COMPILATION_CACHE_DIR to another folder ***")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own caches, whose errors stop a run
    if jax.config.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def show_warning(message: Warning, *rest: Any, **more: Any) -> None:
    """Show a warning as before, unless it reports a damaged program."""
    if str(message).startswith(UNREADABLE):
        repair(str(message).split("'")[1])
    else:
        shown(message, *rest, **more)


def repair(name: str) -> None:
    """Remove the program of this name that JAX has just failed to read, and say so. JAX compiles it again, but never replaces a
    file that exists. Of several programs of the name, JAX marked the one that it read last."""

    def used(path: Path) -> float:
        mark = path.with_name(path.name.removesuffix(PROGRAM) + USED)
        return (mark if mark.exists() else path).stat().st_mtime

    with contextlib.suppress(OSError, ValueError):
        folder = Path(jax.config.jax_compilation_cache_dir)
        max(folder.glob(f"{glob.escape(name)}-*{PROGRAM}"), key=used).unlink()
        print(f"*** the cached program {name} in {folder} was damaged; compiling it again ***", flush=True)


def remove_unfinished(folder: Path) -> None:
    """Remove programs that a full disk or a kill left incomplete. JAX would try to load them at every start and never replace
    them. JAX writes the time of last use after the program, so a program without it is incomplete."""
    for path in folder.glob(f"*{PROGRAM}"):
        if not path.with_name(path.name.removesuffix(PROGRAM) + USED).exists():
            path.unlink()


def kind_of_machine() -> str:
    """Return a name for machines that can run each other's programs. Several machines may share a home folder, and JAX does not
    check which instructions a processor supports."""
    known = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "cpu\t"))})
    except OSError:  # not Linux
        known.append(platform.processor())
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]
