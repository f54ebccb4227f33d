"""Compiled programs that the next start finds again."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import filelock
import jax

MOST_BYTES = 2**30  # of all programs kept for a kind of machine; those used least recently go first
LOCK, PROGRAM, USED = ".lockfile", "-cache", "-atime"  # how JAX names its files


def keep_compiled() -> None:
    """Has JAX keep what took it a second or more to compile, in ~/.cache/deep-spi (or under XDG_CACHE_HOME): unless its own
    variables name a folder (JAX_COMPILATION_CACHE_DIR), or say that it shall not (JAX_ENABLE_COMPILATION_CACHE=0).

    Where that folder cannot be used, a line says so, and nothing is kept.
    """
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # it is compiled, all the same
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
        print(f"*** compiled programs are not kept: {folder}: {why}; JAX_COMPILATION_CACHE_DIR can name another folder ***")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # those of XLA itself, whose errors end a run
    if jax.config.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def remove_unfinished(folder: Path) -> None:
    """Removes programs that a full disk or a kill left half written: JAX would try them at every start, and never replace them.
    It writes a program, then when that was used last."""
    for path in folder.glob(f"*{PROGRAM}"):
        if not path.with_name(path.name.removesuffix(PROGRAM) + USED).exists():
            path.unlink()


def kind_of_machine() -> str:
    """A name for machines that can run each other's programs: a home may be shared by several, and JAX does not look at what
    instructions a processor has."""
    known = [platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "cpu\t"))})
    except OSError:  # not Linux
        known.append(platform.processor())
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]
