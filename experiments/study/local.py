"""Run a study on this machine, several runs at a time."""

import contextlib
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from experiments.study import status
from experiments.study.plan import (
    BEGAN,
    ENDED,
    STOPPED,
    PlannedRun,
    Progress,
    is_at_work,
    log_path,
    python_path,
    state_of,
    to_paste,
)
from utils.control_groups import cpu_quota
from utils.runs.flags import require
from utils.runs.folder import ROOT
from utils.runs.signals import Interrupted, Signals

WHOLE = 0.9  # fraction of a GPU's memory for all its runs
DEVICE = re.compile(r"\d+|(GPU|MIG)-.+")  # as CUDA_VISIBLE_DEVICES names it
NVIDIA_SMI_SECONDS = 20.0  # it takes seconds on large machines without persistence mode
POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between checks for runs of other processes
ATTEMPTS = 2  # a failed run is retried once
USAGE = 2  # exit code of a usage error, which a retry would repeat


class Slot(NamedTuple):
    """Resources for one run."""

    number: int
    cores: tuple[int, ...]  # the run is pinned to them; empty: not pinned
    gpu: str | None  # index or UUID; empty: no GPU is wanted; None: none was found
    share: float  # fraction of the GPU's memory


def visible_gpus() -> list[str]:
    """Return the indices or UUIDs of the GPUs that this process may use. Each MIG instance of a GPU is one by itself."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0].strip() == "cpu":  # the first one is the default
        return []
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:  # like CUDA, stop at the first word that is no device, such as -1 or NoDevFiles
        words = [word.strip() for word in asked.split(",")]
        return list(itertools.takewhile(DEVICE.fullmatch, words))
    return list(_present_gpus())


@functools.cache  # prints its warning only once
def _present_gpus() -> tuple[str, ...]:
    """Return the GPUs that nvidia-smi lists. If it fails or does not end, print a line and return none."""
    found, why = _listed_gpus()
    if why:
        print(
            f"*** no GPU is used: nvidia-smi: {why}. Name the GPUs with --gpus, or use none with an empty --gpus ***",
            flush=True,
        )
    return found


@functools.cache  # it may take seconds
def _listed_gpus() -> tuple[tuple[str, ...], str]:
    """Return the GPUs that nvidia-smi lists, and why there are none if it fails or does not end."""
    if shutil.which("nvidia-smi") is None:
        return (), ""
    listed, why = "", ""
    try:
        process = subprocess.Popen(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        listed, _ = process.communicate(timeout=NVIDIA_SMI_SECONDS)
        if process.returncode != 0:
            why = " ".join(listed.split()) or f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()  # without waiting: a process that waits for a broken driver does not end
        why = f"does not end within {NVIDIA_SMI_SECONDS:.0f} s"
    except OSError as error:
        why = str(error)
    if why:
        return (), why
    found: list[list[str]] = []
    for line in listed.splitlines():
        if line.startswith("GPU "):
            found.append([])
        elif found and (instance := re.search(r"\(UUID: (MIG-[^)]+)\)", line)):
            found[-1].append(instance[1])
    return tuple(gpu for i, instances in enumerate(found) for gpu in instances or [str(i)]), ""


def make_slots(gpus: tuple[str, ...] | None, runs_per_gpu: int, workers: int | None) -> list[Slot]:
    """Return slots for runs: `runs_per_gpu` for each GPU; without GPUs `workers`, or one per core, and fewer if a container
    limits its CPU time. Cores are divided evenly.

    Args:
        gpus: indices or UUIDs of GPUs; None takes all visible GPUs, () none.
        runs_per_gpu: number of runs that share a GPU.
        workers: number of slots if no GPU is used.

    Raises:
        UsageError: the flags are wrong or contradict each other.
    """
    require(runs_per_gpu >= 1, f"--runs-per-gpu {runs_per_gpu}: must be at least 1")
    require(workers is None or workers >= 1, f"--workers {workers}: must be at least 1")
    found = visible_gpus() if gpus is None else list(gpus)
    wrong = next((gpu for gpu in gpus or () if not DEVICE.fullmatch(gpu)), None)
    require(wrong is None, f"--gpus {wrong}: is no index or UUID of a GPU; separate several by spaces, --gpus 0 1")
    listed = _listed_gpus()[0] if gpus else ()
    unknown = next((gpu for gpu in gpus or () if gpu.isdecimal() and listed and int(gpu) >= len(listed)), None)
    require(unknown is None, f"--gpus {unknown}: nvidia-smi lists {len(listed)} GPUs, numbered from 0")
    require(bool(found) or runs_per_gpu == 1, f"--runs-per-gpu {runs_per_gpu}: no GPU is used; use --workers")
    require(len(set(found)) == len(found), f"--gpus {' '.join(found)}: has duplicates; remove them")
    require(not found or workers is None, "--workers: applies only without GPUs; use --runs-per-gpu, or leave --gpus empty")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    usable, quota = len(cores) or os.cpu_count() or 1, cpu_quota()
    usable = usable if quota is None else max(1, min(usable, int(quota)))
    number = len(found) * runs_per_gpu or workers or usable
    slots, absent = [], None if gpus is None else ""
    for i in range(number):
        own = cores[i * len(cores) // number : (i + 1) * len(cores) // number] or cores[i % max(1, len(cores)) :][:1]
        slots.append(Slot(i, tuple(own), found[i // runs_per_gpu] if found else absent, WHOLE / runs_per_gpu))
    return slots


def refuse_resources(gpus: tuple[str, ...] | None, runs_per_gpu: int, workers: int | None) -> None:
    """Refuse the arguments of `make_slots` for runs that SLURM starts.

    Raises:
        UsageError: one of them is not the default.
    """
    said = "--slurm: the batch script sets the resources; leave out --gpus, --runs-per-gpu and --workers"
    require(gpus is None and runs_per_gpu == 1 and workers is None, said)


class Worker(NamedTuple):
    """A run that this process has started."""

    run: PlannedRun
    process: subprocess.Popen
    slot: Slot


def start(logdir: Path, run: PlannedRun, slot: Slot) -> Worker:
    """Start or resume a run, and append its output to its log."""
    env = os.environ | {"PYTHONPATH": python_path()}
    if slot.gpu:
        env["CUDA_VISIBLE_DEVICES"] = slot.gpu
        if slot.share < WHOLE:
            env.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the old name: JAX rejects both at once
            env["XLA_CLIENT_MEM_FRACTION"] = f"{slot.share:.2f}"
    elif slot.gpu is not None:
        env["JAX_PLATFORMS"] = "cpu"
    path = log_path(logdir, run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        log.write(f"{BEGAN} {time.strftime('%Y-%m-%dT%H:%M:%S%z')} in place {slot.number}: {to_paste(run.command)}\n")
        log.flush()
        # in its own session, so that Ctrl-C and a closing terminal signal only the launcher, which forwards them
        process = subprocess.Popen(
            run.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=env, start_new_session=True
        )
    if slot.cores:
        with contextlib.suppress(OSError):  # before it starts threads
            os.sched_setaffinity(process.pid, slot.cores)
    return Worker(run, process, slot)


class Source:
    """The runs for `launch`. Here they are a fixed list; a subclass may add runs while others are running, and drop runs."""

    def __init__(self, runs: list[PlannedRun]):
        self.coming: list[PlannedRun] | None = runs
        self.dropped: dict[str, PlannedRun] = {}  # runs to stop, and not to start, by name

    def more(self) -> list[PlannedRun] | None:
        """Return more runs, or None if there will be no more. `launch` calls this every `POLL_SECONDS`."""
        coming, self.coming = self.coming, None
        return coming

    def greeting(self, new: list[PlannedRun], finished: int) -> str:
        """Return what to print about runs that have come, some of which are already finished; nothing if it is empty."""
        return f"{len(new)} runs, {finished} already finished"

    def over(self, run: PlannedRun, state: Progress) -> None:
        """Note the state of a run that is finished, or that has failed and will not be retried."""

    def rank(self, run: PlannedRun) -> int:
        """Return a number: the waiting run with the lowest one starts first, and of several, the one that came first."""
        return 0

    def summary(self, runs: list[PlannedRun], states: dict[str, Progress], together: int) -> str:
        """Return one line about the progress of all runs; see `status.summary`."""
        return status.summary(runs, states, together)


def launch(logdir: Path, source: Source, slots: list[Slot], live: status.Live | None = None) -> list[PlannedRun]:
    """Run everything until each run is finished or has failed twice (once on a usage error). Return the unfinished runs.

    Runs of other processes (orphans of a launcher that was killed) occupy slots, and the launcher waits for them.

    Raises:
        Interrupted: a signal asked to stop; it was forwarded to all runs, and they have saved.
        OSError: a log could not be written; all runs were stopped.
    """
    runs: list[PlannedRun] = []
    states, live, attempts = status.Progresses(logdir, runs), live or status.Live(), Counter()
    waiting: list[PlannedRun] = []
    workers: list[Worker] = []
    elsewhere, places, looked, stopped, ended = set(), set(), 0.0, set(), False
    signals = Signals()
    signals.watch(lambda signum: live.say(f"stopping {len(workers)} runs, which save first ... (repeat to exit at once)"))

    try:
        while waiting or workers or not ended:
            if signals.received:
                raise Interrupted(signals.received)
            for worker in [w for w in workers if w.process.poll() is not None]:
                workers.remove(worker)
                if _ended(logdir, worker, attempts, live, worker.run.name in source.dropped):  # again
                    waiting.append(worker.run)
                else:
                    source.over(worker.run, state_of(logdir, worker.run))
            new = None if ended else source.more()  # knows what has just ended, before its slot is taken
            ended = new is None
            if new:
                runs += new
                known = states.read()
                finished = [run for run in new if known[run.name].kind == "finished"]
                if said := source.greeting(new, len(finished)):
                    live.say(f"{said}; up to {len(slots)} at a time, in {logdir}")
                for run in finished:
                    source.over(run, known[run.name])
                waiting += [run for run in new if run not in finished]
            for worker in workers:
                if worker.run.name in source.dropped.keys() - stopped:
                    stopped.add(worker.run.name)  # a second signal would end it without saving
                    worker.process.terminate()
            waiting = sorted((run for run in waiting if run.name not in source.dropped), key=source.rank)
            if time.monotonic() - looked > LOOK_SECONDS or new:
                looked = time.monotonic()
                here = {worker.run.name for worker in workers}
                foreign = {run.name for run in waiting} | source.dropped.keys() - here
                before, elsewhere = elsewhere, {name for name in foreign if is_at_work(logdir / name)}
                places = {place_of(logdir, name) for name in elsewhere}
                for name in sorted(elsewhere & source.dropped.keys() - stopped):
                    stopped.add(name)
                    terminate_orphan(source.dropped[name])
                for name in sorted(elsewhere - before - source.dropped.keys()):
                    live.say(f"{name} is running in another process: waiting for it")
                for run in [run for run in waiting if run.name in before - elsewhere]:
                    if (state := state_of(logdir, run)).kind == "finished":
                        waiting.remove(run)
                        source.over(run, state)
            taken = places | {worker.slot.number for worker in workers}
            free = [slot for slot in slots if slot.number not in taken]
            free = free[: max(0, len(slots) - len(workers) - len(elsewhere))]
            for slot, run in zip(free, [run for run in waiting if run.name not in elsewhere], strict=False):
                waiting.remove(run)
                workers.append(start(logdir, run, slot))
            if live.due():
                now = states.read()
                live.show([source.summary(runs, now, len(slots)), *status.running(runs, now)])
            time.sleep(POLL_SECONDS)
    finally:
        _stop(logdir, workers)
        signals.restore()
    states.read()
    return [run for run in runs if states.states[run.name].kind != "finished"]


def terminate_orphan(run: PlannedRun) -> None:
    """Ask the process of a run to stop, if this machine lists processes in /proc. Its launcher was killed."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # another user's, or ended in the meantime
            words = path.read_bytes().decode(errors="replace").split("\0")[:-1]
            if words[1:] == run.command[1:]:  # Python may be another one
                os.kill(int(path.parent.name), signal.SIGTERM)


def place_of(logdir: Path, name: str) -> int | None:
    """Return the number of the slot of the run's last process, which may still be running; None if unknown."""
    try:
        text = log_path(logdir, name).read_text(errors="replace")
    except OSError:  # missing or unreadable
        return None
    found = re.findall(rf"^{BEGAN} \S+ in place (\d+): ", text, re.M)
    return int(found[-1]) if found else None


def _note_end(logdir: Path, worker: Worker) -> int:
    """Append the exit code of a process to its log, and return it: 128 + the signal's number if a signal ended it."""
    code = worker.process.returncode
    code = code if code >= 0 else 128 - code
    with log_path(logdir, worker.run.name).open("a") as log:
        log.write(f"{ENDED} {code}\n")
    return code


def _ended(logdir: Path, worker: Worker, attempts: Counter, live: status.Live, dropped: bool) -> bool:
    """Print how a run ended. Return True if it should be retried, or if another process runs it."""
    run, code = worker.run, _note_end(logdir, worker)
    state = state_of(logdir, run)
    if dropped:
        return False
    if state.kind == "finished":
        live.say(f"finished: {run.name}")
        return False
    if state.kind == "running":  # another process took the run first
        return True
    attempts[run.name] += 1
    again = attempts[run.name] < ATTEMPTS and code != USAGE
    what = f"stopped by a signal at step {state.step:,}" if code in STOPPED else state.error or f"exit code {code}"
    live.say(f"{'retrying' if again else 'FAILED'}: {run.name}: {what} (log: {log_path(logdir, run.name)})")
    return again


def _stop(logdir: Path, workers: list[Worker]) -> None:
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.terminate()
    for worker in workers:
        worker.process.wait()
        with contextlib.suppress(OSError):
            _note_end(logdir, worker)
