"""Signals that ask a run to stop: Ctrl-C, SIGTERM (from schedulers), and SIGHUP (from a terminal that closes).

The first signal is only noted, so that the run can finish its update and save. A second one ends the process immediately.
Python calls signal handlers only between its own instructions, not while XLA compiles or a device computes. A separate thread
therefore reads the signals, from the pipe to which Python's C code writes each of them.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from utils.runs.quiet_start import HEEDED

ECHO_SECONDS = 3.0  # a SIGTERM may arrive again, forwarded by `uv run` or by the launcher of a study: one signal, not two


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def heeded() -> list[int]:
    """Return the signals to handle: all that are not ignored already (by nohup, or for a shell's background jobs).

    The list is empty outside the main thread, the only thread that may set signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [s for s in HEEDED if signal.getsignal(s) is not signal.SIG_IGN]


class Signals:
    """Signal handling of a run. After `raise_at_once` signals raise `Interrupted`. After `watch` the first one is noted and the
    second one ends the process. `restore` reinstates the previous handlers.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self):
        self.received = None
        self.before = {s: signal.getsignal(s) for s in heeded()}
        self.thread = None

    def raise_at_once(self) -> None:
        """Make signals raise `Interrupted`, while there is nothing to finish."""

        def interrupt(signum, _):
            raise Interrupted(signum)

        for s in self.before:
            signal.signal(s, interrupt)

    def watch(self, first: Callable[[int], None]) -> None:
        """Note signals from now on. `first` is called with the first one, in a thread of its own."""
        if not self.before:
            return
        self.reading, self.writing = socket.socketpair()
        self.writing.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.writing.fileno(), warn_on_full_buffer=False)
        for s in self.before:
            signal.signal(s, lambda *_: None)  # without a handler Python's C code would not write the signal
        self.thread = threading.Thread(target=self._read, args=(first,), daemon=True)
        self.thread.start()

    def _read(self, first: Callable[[int], None]) -> None:
        noted = 0.0
        while received := self.reading.recv(1):
            (signum,) = received
            if signum not in self.before:
                continue
            if self.received is None:
                self.received, noted = signum, time.monotonic()
                # `first` may block, and a second signal must still be read
                threading.Thread(target=first, args=(signum,), daemon=True).start()
            elif signum == signal.SIGINT or time.monotonic() - noted > ECHO_SECONDS:
                os._exit(128 + signum)

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        if self.thread is not None:
            signal.set_wakeup_fd(self.wakeup)
        for s, handler in self.before.items():
            signal.signal(s, handler)
        if self.thread is not None:
            self.writing.close()
            self.thread.join()
            self.reading.close()
