"""Signals that ask a run to stop: Ctrl-C, SIGTERM (of schedulers), and SIGHUP (of a terminal that closes).

The first one is noted, so that a run can finish its update and save; a second one ends the process at once. Python itself heeds
signals only between two of its own instructions, and neither while XLA compiles nor while a device computes: so a thread of
their own reads them, from the pipe that Python's C code writes each signal to.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from utils.runs.quiet_start import HEEDED

ECHO_SECONDS = 0.5  # `uv run` passes on the SIGTERM that a scheduler sends to all processes of a job: that is no second one


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def heeded() -> list[int]:
    """The signals to heed: not those that whoever started the process has set to be ignored (nohup, a shell's background).

    None outside the main thread, which alone may say what a signal does.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [s for s in HEEDED if signal.getsignal(s) is not signal.SIG_IGN]


class Signals:
    """From `raise_at_once` to `restore` signals raise `Interrupted`; after `watch`, the first one is noted and the second one
    ends the process.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self):
        self.received = None
        self.before = {s: signal.getsignal(s) for s in heeded()}
        self.thread = None

    def raise_at_once(self) -> None:
        """Where there is nothing to finish."""

        def interrupt(signum, _):
            raise Interrupted(signum)

        for s in self.before:
            signal.signal(s, interrupt)

    def watch(self, first: Callable[[int], None]) -> None:
        """From now on signals are noted. `first` is called with the first one, in a thread of its own."""
        if not self.before:
            return
        self.reading, self.writing = socket.socketpair()
        self.writing.setblocking(False)
        self.wakeup = signal.set_wakeup_fd(self.writing.fileno(), warn_on_full_buffer=False)
        for s in self.before:
            signal.signal(s, lambda *_: None)  # or Python's C code would not write it
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
                # what it prints or closes may block, and a second signal is to be read all the same
                threading.Thread(target=first, args=(signum,), daemon=True).start()
            elif signum == signal.SIGINT or time.monotonic() - noted > ECHO_SECONDS:
                os._exit(128 + signum)

    def restore(self) -> None:
        """Signals do again what they did."""
        if self.thread is not None:
            signal.set_wakeup_fd(self.wakeup)
        for s, handler in self.before.items():
            signal.signal(s, handler)
        if self.thread is not None:
            self.writing.close()
            self.thread.join()
            self.reading.close()
