"""Before anything else is imported: Ctrl-C, SIGTERM and SIGHUP end the process at once and without a traceback, there is
something to print to, and what is not installed is named in one line.

Called first, by a script that is started and not by one that is imported:

    if __name__ == "__main__":
        from utils.runs.quiet_start import start_quietly

        start_quietly()

From then on SIGINT raises no KeyboardInterrupt wherever Python happens to be. Until a `Run` has something to end properly,
there is nothing to lose, and the process goes. (In the background of a shell SIGINT is ignored, and under nohup SIGHUP: they
stay so.)
"""

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

HEEDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


def leave_at_once(signum: int, *_) -> None:
    """A handler of signals: no cleaning up, nothing said."""
    os._exit(128 + signum)  # as a shell says of a process that a signal ended


class Unbreakable:
    """A standard stream whose reader may go away (`| head`, a closed terminal), whose disk may be full, and whose encoding may
    lack a letter: a run goes on without it."""

    def __init__(self, stream):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes if it can."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flushes if it can."""
        self._attempt(self._stream.flush)

    def _attempt(self, action, *args):
        try:
            action(*args)
        except BlockingIOError:  # a reader that is slow
            pass
        except (OSError, ValueError):  # ValueError: it is closed
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                # what it still holds is written when Python exits: then to nowhere
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name):
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Makes sys.stdout and sys.stderr `Unbreakable`; a closed one (`>&-`) becomes one that leads nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")
        setattr(sys, name, Unbreakable(stream))


def explain(kind, error, trace) -> None:
    """What Python calls for an error that nobody handles: a traceback, but one line and exit code 2 for a missing package, or
    for what JAX makes of an environment variable."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    ours = Path(__file__).parents[2]
    frames = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith("<")]
    if isinstance(error, ModuleNotFoundError) and not ((ours / package).exists() or (ours / f"{package}.py").exists()):
        remedy = "start the script with `uv run`, or `pip install -r requirements.lock` first"
        said = f"there is no package {error.name} in this Python ({sys.executable}): {remedy}"
    elif isinstance(error, ValueError) and frames and Path(frames[-1].filename).parts[-3:] == ("jax", "_src", "config.py"):
        said = f"JAX does not take an environment variable: {error}"
    else:
        return sys.__excepthook__(kind, error, trace)
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(2)  # Python itself would say 1


def start_quietly() -> None:
    """See the head of this file."""
    guard_streams()
    sys.excepthook = explain
    for s in HEEDED:
        if signal.getsignal(s) is not signal.SIG_IGN:
            signal.signal(s, leave_at_once)
