"""Runs of a study on this machine, so many at a time."""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from experiments.study import status
from experiments.study.grid import BEGAN, ENDED, STOPPED, PlannedRun, is_at_work, log_path, state_of
from utils.runs.flags import require
from utils.runs.folder import ROOT
from utils.runs.signals import Interrupted, Signals

WHOLE = 0.9  # share of a GPU's memory that runs take together
POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between two looks at runs that other processes work at
ATTEMPTS = 2  # a run that fails is tried once more
USAGE = 2  # exit code of a mistake, which would be made again


class Slot(NamedTuple):
    """Where a run can work."""

    number: int
    cores: tuple[int, ...]  # that it is kept to; none: it is not
    gpu: str | None
    share: float  # of the GPU's memory


def visible_gpus() -> list[str]:
    """The numbers of the GPUs of this machine that this process may use."""
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return []
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:  # CUDA reads it up to the first number that there cannot be
        words = [word.strip() for word in asked.split(",")]
        return list(itertools.takewhile(lambda word: word and not word.startswith("-"), words))
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, line in enumerate(x for x in listed.stdout.splitlines() if x.startswith("GPU "))]


def make_slots(gpus: tuple[str, ...] | None, runs_per_gpu: int, workers: int | None) -> list[Slot]:
    """Places for runs: some on each GPU; without a GPU one on each core, or `workers`. They share the cores evenly.

    Args:
        gpus: numbers of GPUs; None takes all that are visible, () none.
        runs_per_gpu: runs that share one.
        workers: runs at a time, where there is no GPU.

    Raises:
        UsageError: they cannot be had.
    """
    require(runs_per_gpu >= 1, f"--runs-per-gpu {runs_per_gpu}: must be at least 1")
    require(workers is None or workers >= 1, f"--workers {workers}: must be at least 1")
    found = visible_gpus() if gpus is None else list(gpus)
    require(len(set(found)) == len(found), f"--gpus {' '.join(found)}: names one twice")
    require(not found or workers is None, "--workers: is read only without GPUs; see --runs-per-gpu, or leave --gpus empty")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    number = len(found) * runs_per_gpu or workers or len(cores) or os.cpu_count() or 1
    slots = []
    for i in range(number):
        own = cores[i * len(cores) // number : (i + 1) * len(cores) // number] or cores[i % max(1, len(cores)) :][:1]
        slots.append(Slot(i, tuple(own), found[i // runs_per_gpu] if found else None, WHOLE / runs_per_gpu))
    return slots


class Worker(NamedTuple):
    """A run that this process has started."""

    run: PlannedRun
    process: subprocess.Popen
    slot: Slot


def start(logdir: Path, run: PlannedRun, slot: Slot) -> Worker:
    """Starts a run, new or continued; what it prints is added to its log."""
    env = dict(os.environ)
    if slot.gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = slot.gpu
        if slot.share < WHOLE:
            env.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the old name, and JAX takes but one
            env["XLA_CLIENT_MEM_FRACTION"] = f"{slot.share:.2f}"
    elif visible_gpus():
        env["JAX_PLATFORMS"] = "cpu"
    path = log_path(logdir, run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(f"{BEGAN} {time.strftime('%Y-%m-%dT%H:%M:%S%z')} in place {slot.number}: {shlex.join(run.command)}\n")
        log.flush()
        # a session of its own: Ctrl-C in the terminal, and its end, reach this process alone, which passes them on
        process = subprocess.Popen(
            run.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=env, start_new_session=True
        )
    if slot.cores:
        with contextlib.suppress(OSError):  # before it has any threads
            os.sched_setaffinity(process.pid, slot.cores)
    return Worker(run, process, slot)


def launch(logdir: Path, runs: list[PlannedRun], slots: list[Slot]) -> list[PlannedRun]:
    """Works at all runs until each is finished or has failed twice. Returns those that have not been finished.

    Runs that other processes work at (left behind by a launcher that was killed) are waited for, and count as places taken.

    Raises:
        Interrupted: a signal asked it to stop; it was passed on to all runs, and they have saved.
        OSError: a log could not be written; all runs were stopped.
    """
    states, live, attempts = status.Progresses(logdir, runs), status.Live(), Counter()
    waiting = [run for run in runs if states.states[run.name].kind != "finished"]
    live.say(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before; up to {len(slots)} at a time, in {logdir}")
    workers: list[Worker] = []
    elsewhere, places, looked = set(), set(), 0.0
    signals = Signals()
    signals.watch(lambda signum: live.say(f"stopping {len(workers)} runs, which save first ... (once more: without waiting)"))
    try:
        while waiting or workers:
            if signals.received:
                raise Interrupted(signals.received)
            for worker in [w for w in workers if w.process.poll() is not None]:
                workers.remove(worker)
                waiting += _ended(logdir, worker, attempts, live)
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                before, elsewhere = elsewhere, {run.name for run in waiting if is_at_work(logdir / run.name)}
                places = {place_of(logdir, name) for name in elsewhere}
                for name in sorted(elsewhere - before):
                    live.say(f"another process is at work at {name}: waiting for it")
                finished = {run.name for run in waiting if run.name in before - elsewhere}
                finished = {r.name for r in waiting if r.name in finished and state_of(logdir, r).kind == "finished"}
                waiting = [run for run in waiting if run.name not in finished]
            taken = places | {worker.slot.number for worker in workers}
            free = [slot for slot in slots if slot.number not in taken]
            free = free[: max(0, len(slots) - len(workers) - len(elsewhere))]
            for slot, run in zip(free, [run for run in waiting if run.name not in elsewhere], strict=False):
                waiting.remove(run)
                workers.append(start(logdir, run, slot))
            if live.due():
                now = states.read()
                live.show([status.summary(runs, now, len(slots)), *status.running(runs, now)])
            time.sleep(POLL_SECONDS)
    finally:
        _stop(logdir, workers)
        signals.restore()
    states.read()
    return [run for run in runs if states.states[run.name].kind != "finished"]


def place_of(logdir: Path, name: str) -> int | None:
    """The number of the slot that a launcher gave the run's last process, which may be at work there still."""
    path = log_path(logdir, name)
    found = re.findall(rf"^{BEGAN} \S+ in place (\d+): ", path.read_text(errors="replace"), re.M) if path.exists() else []
    return int(found[-1]) if found else None


def _note_end(logdir: Path, worker: Worker) -> int:
    """Writes the exit code of a process into its log, and returns it: 128 and the signal's number if one has ended it."""
    code = worker.process.returncode
    code = code if code >= 0 else 128 - code
    with log_path(logdir, worker.run.name).open("a") as log:
        log.write(f"{ENDED} {code}\n")
    return code


def _ended(logdir: Path, worker: Worker, attempts: Counter, live: status.Live) -> list[PlannedRun]:
    """Notes how a run has ended. Returns it if it is to be tried again."""
    run, code = worker.run, _note_end(logdir, worker)
    state = state_of(logdir, run)
    if state.kind == "finished":
        live.say(f"finished: {run.name}")
        return []
    if state.kind == "running":  # another process was faster
        return [run]
    attempts[run.name] += 1
    again = attempts[run.name] < ATTEMPTS and code != USAGE
    what = f"was asked to stop at step {state.step:,}" if code in STOPPED else state.error or f"exit code {code}"
    live.say(f"{'tried again' if again else 'FAILED'}: {run.name}: {what} (all it said: {log_path(logdir, run.name)})")
    return [run] if again else []


def _stop(logdir: Path, workers: list[Worker]) -> None:
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.terminate()
    for worker in workers:
        worker.process.wait()
        with contextlib.suppress(OSError):
            _note_end(logdir, worker)
