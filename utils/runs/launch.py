"""How scripts start, and how errors end them."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from envs.options import EnvError
from utils.devices import use_devices
from utils.runs.compilation_cache import keep_compiled
from utils.runs.flags import UsageError, check_flags, parse_flags, require
from utils.runs.quiet_start import HEEDED

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = dict.fromkeys(FULL, "; is the disk full? free some space, then run this again")
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; choose another folder")
OUT_OF_MEMORY = "out of memory: lower --num-envs or --num-steps, or raise --num-minibatches"
OUT_OF_MEMORY += " (with a replay buffer: lower --replay-capacity or --replay-batch-size)"


debugs_nans = False  # True while --debug-nans of a run is in force


class NotFinite(Exception):
    """A loss or a parameter is NaN or infinite. The message is one line that says where, and how to investigate."""


class FolderLost(Exception):
    """The folder of a run was moved or deleted while the run wrote to it. The message is one line that says where it is."""


class RunIsFinished(Exception):
    """The run to resume is already finished."""


def run_script(main: Callable, args_type: type) -> None:
    """Parse the command line and run a script's `main`; see `run_main`."""
    run_main(lambda: main(parse_flags(args_type)))


def run_main(main: Callable[[], None], out_of_memory: str = OUT_OF_MEMORY) -> None:
    """Run `main`. Errors that are not bugs end the process with a one-line message; `out_of_memory` is that for a full memory.

    Exit codes: 0 on success or if the run was already finished; 2 for a mistake of the user; 128 + signal number if a signal
    stopped the run (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP); 1 otherwise.
    """
    try:
        main()
    except (UsageError, EnvError) as error:
        fail(str(error), 2)
    except RunIsFinished as finished:
        print(finished)
    except (NotFinite, FolderLost) as error:
        fail(str(error), 1)
    except KeyboardInterrupt as stop:
        sys.exit(128 + getattr(stop, "signum", signal.SIGINT))
    except MemoryError:
        fail(out_of_memory, 1)
    except OSError as error:  # such as a full disk or a read-only folder
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}{REMEDIES.get(error.errno, '')}", 1)
    except jax.errors.JaxRuntimeError as error:
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        print(f"error: {out_of_memory}", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1)  # all files are closed; a normal exit would make JAX raise the error again
    finally:  # only the interpreter's shutdown is left; no signal may print a traceback there
        if threading.current_thread() is threading.main_thread():
            for s in HEEDED:
                signal.signal(s, signal.SIG_IGN)


def fail(message: str, code: int) -> NoReturn:
    """Print the message as one line and end the process with the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def one_line(error: Exception) -> str:
    """Return the error's message in one line, or its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def check_run(args: Any) -> None:
    """Check the flags and start JAX as its environment variables request, before any folder or W&B run is created.

    Raises:
        UsageError: the first mistake found.
    """
    check_flags(args)
    global debugs_nans
    if args.debug_nans or debugs_nans:  # by this run, or by an earlier one in this process
        jax.config.update("jax_debug_nans", args.debug_nans)
        debugs_nans = args.debug_nans
    require(not jax.config.jax_enable_x64, "JAX_ENABLE_X64: not supported, the scripts compute in 32 bits; unset it")
    start_jax()
    found = len(jax.devices())
    keep_compiled()
    known = " (JAX_NUM_CPU_DEVICES splits a CPU into several devices)" if jax.default_backend() == "cpu" else ""
    require(args.num_devices <= found, f"--num-devices {args.num_devices}: JAX finds only {found}; use {found} or fewer{known}")
    use_devices(args.num_devices)


def start_jax() -> None:
    """Start JAX as its environment variables request.

    Raises:
        UsageError: it cannot start.
    """
    asked = jax.config.jax_platforms
    try:
        jax.devices()
    except Exception as error:  # JAX plugins may raise any type
        why = one_line(error)
        what = (
            f"with JAX_PLATFORMS={asked} ({why}); unset it" if asked else f"({why}); set JAX_PLATFORMS=cpu to run without a GPU"
        )
        raise UsageError(f"JAX cannot start {what}, or see docs/install.md") from None


def describe_device() -> str:
    """Return text that describes JAX's device. On the CPU, add a warning that says how to use a GPU.

    Raises:
        UsageError: JAX cannot start.
    """
    start_jax()
    device = jax.devices()[0]
    used = "one" if (mesh := jax.sharding.get_mesh()).empty else mesh.size
    if device.platform != "cpu":
        return f"device: {device.device_kind} ({jax.device_count()} visible, {used} used), jax {jax.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    why = "JAX_PLATFORMS requests it" if "cpu" in os.environ.get("JAX_PLATFORMS", "") else "JAX found no GPU"
    return (
        f"device: CPU, {cores} cores{'' if used == 'one' else f' as {used} devices'}, jax {jax.__version__}\n"
        f"*** RUNNING ON THE CPU: {why}. For an NVIDIA GPU: uv sync --extra cuda13 (driver 580 or newer), or\n"
        "*** uv sync --extra cuda12 (driver 525 or newer); without uv: pip install 'jax[cuda13]'. ***"
    )
