"""How a script starts, and how its errors end it."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from utils.devices import use_devices
from utils.runs.compilation_cache import keep_compiled
from utils.runs.flags import UsageError, check_flags, parse_flags, require
from utils.runs.quiet_start import HEEDED

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = dict.fromkeys(FULL, "; is the disk full? make room there, and type this again")
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; choose another --logdir")
OUT_OF_MEMORY = "out of memory: lower --num-envs, --num-steps (or --replay-capacity), or raise --num-minibatches"


class NotFinite(Exception):
    """A loss, or a parameter, is NaN or infinite. The text is one line that says where, and how to look into it."""


class RunIsFinished(Exception):
    """The run that was to be continued is complete."""


def run_script(main: Callable, args_type: type) -> None:
    """Parses the command line and runs a script's `main`; see `run_main`."""
    run_main(lambda: main(parse_flags(args_type)))


def run_main(main: Callable[[], None]) -> None:
    """Runs it. What goes wrong for a reason that is not the code's ends in one line.

    Exit codes: 0 also where the run was finished before; 2 for a mistake of the user's; 128 and the signal's number where one
    asked it to stop (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP); 1 for the rest.
    """
    try:
        main()
    except UsageError as error:
        fail(str(error), 2)
    except RunIsFinished as finished:
        print(finished)
    except NotFinite as error:
        fail(str(error), 1)
    except KeyboardInterrupt as stop:
        sys.exit(128 + getattr(stop, "signum", signal.SIGINT))
    except MemoryError:
        fail(OUT_OF_MEMORY, 1)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}{REMEDIES.get(error.errno, '')}", 1)
    except jax.errors.JaxRuntimeError as error:
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1)  # all is closed, and JAX would raise the same error once more when Python exits
    finally:  # what is left is Python's own end, and no signal may show it
        if threading.current_thread() is threading.main_thread():
            for s in HEEDED:
                signal.signal(s, signal.SIG_IGN)


def fail(message: str, code: int) -> NoReturn:
    """Ends the process with an error, in one line."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def one_line(error: Exception) -> str:
    """What an error says, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def check_run(args: Any) -> None:
    """Checks the flags, and that JAX starts as its environment variables ask: before a folder or a W&B run exists.

    Raises:
        UsageError: the first mistake found.
    """
    check_flags(args)
    if args.debug_nans:
        jax.config.update("jax_debug_nans", True)
    require(
        not jax.config.jax_enable_x64, "JAX_ENABLE_X64: the scripts compute in 32 bits, and nothing gains from more; unset it"
    )
    asked = jax.config.jax_platforms
    try:
        jax.devices()
    except Exception as error:  # of whatever kind its plugins raise
        why = one_line(error)
        what = (
            f"what JAX_PLATFORMS={asked} asks for ({why}); unset it"
            if asked
            else f"({why}); JAX_PLATFORMS=cpu does without a GPU"
        )
        raise UsageError(f"JAX cannot start {what}, or see docs/install.md") from None
    found = len(jax.devices())
    keep_compiled()
    known = " (JAX_NUM_CPU_DEVICES makes a CPU look like several)" if jax.default_backend() == "cpu" else ""
    require(
        args.num_devices <= found, f"--num-devices {args.num_devices}: JAX finds {found} here; ask for {found} or fewer{known}"
    )
    use_devices(args.num_devices)


def describe_device() -> str:
    """One line on what JAX computes on; where that is the CPU, a second one on how to get a GPU used."""
    device = jax.devices()[0]
    used = "one" if (mesh := jax.sharding.get_mesh()).empty else mesh.size
    if device.platform != "cpu":
        return f"device: {device.device_kind} ({jax.device_count()} visible, {used} used), jax {jax.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    why = "JAX_PLATFORMS asks for it" if "cpu" in os.environ.get("JAX_PLATFORMS", "") else "JAX found no GPU"
    return (
        f"device: CPU, {cores} cores{'' if used == 'one' else f' as {used} devices'}, jax {jax.__version__}\n"
        f"*** RUNNING ON THE CPU: {why}. For an NVIDIA GPU: uv sync --extra cuda13 (driver 580 or newer), or\n"
        "*** uv sync --extra cuda12 (driver 525 or newer); without uv: pip install 'jax[cuda13]'. ***"
    )
