"""Set up a script before its other imports. Ctrl-C, SIGTERM and SIGHUP then end the process immediately, without a traceback.
Printing never fails, a missing package is a one-line error, and Matplotlib (which envpool imports) starts from anywhere.

A script calls this first, but only if it is executed, not imported:

    if __name__ == "__main__":
        from utils.runs.quiet_start import start_quietly

        start_quietly()

After this, SIGINT no longer raises KeyboardInterrupt at an arbitrary place. Until a `Run` starts there is nothing to lose, so
signals end the process. Signals that are ignored stay ignored: SIGINT in the background of a shell, SIGHUP under nohup.
"""

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

HEEDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


def leave_at_once(signum: int, *_) -> None:
    """Signal handler: exit without cleanup or output."""
    os._exit(128 + signum)  # the exit code that shells report for a process ended by a signal


class Unbreakable:
    """A standard stream that never fails. The run continues if the reader goes away (`| head`, a closed terminal), the disk is
    full, or the encoding lacks a character."""

    def __init__(self, stream):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text if possible."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        self._attempt(self._stream.flush)

    def _attempt(self, action, *args):
        try:
            action(*args)
        except BlockingIOError:  # a slow reader
            pass
        except (OSError, ValueError):  # ValueError: the stream is closed
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                # Python writes the rest of the buffer when it exits; discard it
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name):
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Make sys.stdout and sys.stderr `Unbreakable`. A closed one (`>&-`) is replaced with os.devnull."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")
        setattr(sys, name, Unbreakable(stream))


def explain(kind, error, trace) -> None:
    """Handle an uncaught exception. For a missing package, or an environment variable that JAX rejects, print one line and exit
    with code 2. For all other errors print a traceback."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    ours = Path(__file__).parents[2]
    frames = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith("<")]
    if isinstance(error, ModuleNotFoundError) and not ((ours / package).exists() or (ours / f"{package}.py").exists()):
        remedy = "start the script with `uv run`, or first run `pip install -r requirements.lock`"
        said = f"package {error.name} is not installed in {sys.executable}; {remedy}"
    elif isinstance(error, ValueError) and frames and Path(frames[-1].filename).parts[-3:] == ("jax", "_src", "config.py"):
        said = f"JAX rejects an environment variable: {error}"
    else:
        return sys.__excepthook__(kind, error, trace)
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(2)  # Python itself would exit with 1


def start_quietly() -> None:
    """Set up streams, the exception hook, signals and Matplotlib's backend; see the module docstring."""
    guard_streams()
    # a notebook exports its own backend, which may be missing here, and a damaged configuration stops Matplotlib's import
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    sys.excepthook = explain
    for s in HEEDED:
        if signal.getsignal(s) is not signal.SIG_IGN:
            signal.signal(s, leave_at_once)
