"""Logs of a training run: metrics.jsonl, a TensorBoard file, Weights & Biases if requested, and a progress line on the
terminal."""

import collections
import contextlib
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tqdm import tqdm

from envs import atari_scores
from envs.registry import atari_protocol
from utils.dreams import traces
from utils.files import write_whole
from utils.guarantees import monitor
from utils.histograms import EDGES
from utils.occasionally import only_measured
from utils.runs.flags import RunArgs
from utils.runs.launch import FolderLost, one_line

METRICS = "metrics.jsonl"
LEARNING = "charts/learning_rate"  # tells updates from rollouts that only fill a replay buffer
PLAIN_LINE_SECONDS = 10.0  # between progress lines if the output is not a terminal
FLUSH_SECONDS = 10.0  # between flushes of the TensorBoard file
STOPPING = ("losses/", "dreams/")  # prefixes of metrics that stop a run if they are not finite
UPDATES_SHOWN = 20  # updates over which the progress line averages the return
SCORE_BINS = 40  # parts of a run; the last two are the last 5%

logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # it warns about every NaN; `Logger` warns once per metric


class EventFile:
    """A TensorBoard file that is written synchronously, so that a full disk raises an error in the caller, not in a thread.

    Args:
        folder: the run's folder.
        purge_step: first step of a resumed run; TensorBoard discards steps from here on in older files of the folder.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        # TensorBoard reads files in order of name: the time in this one must be the latest, even if clocks differ
        times = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        times = [int(seconds) + 1 for seconds in times if seconds.isdecimal()]
        name = f"events.out.tfevents.{max(int(time.time()), *times, 0)}.{socket.gethostname()}.{os.getpid()}"
        self.records, self.flushed = RecordWriter(str(folder / name)), 0.0
        self.add(file_version="brain.Event:2")
        if purge_step is not None:
            self.add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, **content: Any) -> None:
        """Write an event: fields of TensorBoard's `Event`, such as `step`, and `summary` (from `tensorboardX.summary`)."""
        now = time.time()
        self.records.write(Event(wall_time=now, **content).SerializeToString())
        if now - self.flushed > FLUSH_SECONDS:
            self.flushed = now
            self.records.flush()


def _steps(folder: Path) -> list[tuple[bytes, int | None]]:
    """Return each line of metrics.jsonl and its step, or None if the line is not a valid row."""

    def step(line):
        try:
            return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            return None

    path = folder / METRICS
    return [(line, step(line)) for line in path.read_bytes().splitlines(keepends=True)] if path.exists() else []


def last_step(folder: Path) -> int:
    """Return the last step in metrics.jsonl, or 0 if there is none."""
    return max((step for _, step in _steps(folder) if step is not None), default=0)


def cut_back(folder: Path, step: int) -> list[dict[str, Any]]:
    """Remove rows after `step` and invalid rows from metrics.jsonl. Return the rows left."""
    rows = _steps(folder)
    kept = [line for line, of in rows if of is not None and of <= step]
    if len(kept) < len(rows):
        write_whole(folder / METRICS, b"".join(kept))
    return [json.loads(line) for line in kept]


def final_return(folder: Path, planned: int) -> float | None:
    """Return the final score of a run of `planned` steps, as experiments/report.py computes it: the mean return of the episodes
    that ended in its last 5%, or if none did, in the last 40th that has some. Return None if no episode ended."""
    ended: dict[int, list[tuple[float, float]]] = {}
    for row in (json.loads(line) for line, step in _steps(folder) if step is not None):
        if row.get("charts/episodic_return") is not None:
            counted = row["charts/episodic_return"], row["charts/episodes"]
            ended.setdefault(min((row["step"] - 1) * SCORE_BINS // planned, SCORE_BINS - 1), []).append(counted)
    if not ended:
        return None
    last = [pair for k, pairs in ended.items() if k >= SCORE_BINS - 2 for pair in pairs] or ended[max(ended)]
    return sum(value * count for value, count in last) / sum(count for _, count in last)


def check_shapes(metrics: dict[str, np.ndarray]) -> None:
    """Check that each metric can be logged: a scalar, a histogram, a grayscale image, or a trace of dreams.

    Raises:
        ValueError: a metric has another shape; the message names it.
    """
    for name, value in metrics.items():
        shown = value.ndim in (0, 2) or value.shape == (len(EDGES) - 1,) or name.startswith(traces.PREFIX)
        if not shown:
            kinds = f"a scalar, histogram counts [{len(EDGES) - 1}] (utils/histograms.py), or a grayscale image [H, W]"
            raise ValueError(f"metric {name} has shape {list(value.shape)}; it must be {kinds}")


class Logger:
    """Writes the metrics of a run, one set per update, while the device already computes the next update.

    Args:
        args: flags.
        folder: the run's folder.
        steps_per_iteration: environment steps per update.
        iteration: updates done before.
        progress: the return value of `progress` that the checkpoint stores; None without a checkpoint.
        anew: True if the folder has no logs yet.

    Attributes:
        wandb: a `WandbRun`, or None.

    Raises:
        OSError: the folder cannot be written (every method that writes).
        FolderLost: the folder was moved or deleted (every method that writes metrics).
    """

    def __init__(
        self, args: RunArgs, folder: Path, steps_per_iteration: int, iteration: int, progress: dict[str, Any] | None, anew: bool
    ):
        progress = progress or {}
        self.steps_per_iteration, self.stops = steps_per_iteration, args.stop_if_not_finite
        self.step = iteration * steps_per_iteration
        self.total_steps = args.total_timesteps // steps_per_iteration * steps_per_iteration
        self.reference = atari_scores.reference(args.env_id, atari_protocol(args))
        self.episodes = collections.deque(progress.get("episodes", []), UPDATES_SHOWN)  # (count, mean return) of each update
        self.warned = set(progress.get("warned", []))  # names of metrics reported as not finite
        self.elapsed = progress.get("elapsed", 0.0)  # seconds of training
        self.pending = None
        self.prefills = getattr(args, "use_replay_buffer", False)
        self.learned = False  # True once this process has logged an update, not only buffer prefill
        self.first = None  # time at which the first update of this process ended
        self.wandb = None
        self.interactive = sys.stdout.isatty()
        self.folder, self.bar = folder, None
        with self._explained():
            self.metrics = open(folder / METRICS, "a")
            self.events = EventFile(folder, None if anew else self.step + 1)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = f"run stopped: the log could not be written ({error.strerror})"
            raise OSError(error.errno, said, str(self.folder)) from None

    def check_in_place(self) -> None:
        """Raise FolderLost if metrics.jsonl is no longer in the run's folder."""
        opened, path = os.fstat(self.metrics.fileno()), self.folder / METRICS
        with contextlib.suppress(OSError):
            found = path.stat()
            # some file systems have no stable inode numbers
            if os.path.samestat(found, opened) or found.st_size == opened.st_size:
                return
        try:
            now = os.readlink(f"/proc/self/fd/{self.metrics.fileno()}")  # Linux knows where an open file is
        except OSError:
            now = ""
        at = f"run stopped at step {self.step:,}"
        moved = Path(now).parent
        if Path(now).name == METRICS and moved != self.folder.resolve():
            raise FolderLost(
                f"{self.folder}: was moved to {moved} during the run; {at}; resume it with --resume {moved}, without --run-name"
            )
        what = f"{METRICS} was replaced or deleted" if self.folder.exists() else "was deleted"
        raise FolderLost(f"{self.folder}: {what} during the run; {at}; leave the folder of a run in place until it ends")

    def describe(self, flags: dict[str, Any]) -> None:
        """Log the flags to TensorBoard."""
        rows = "\n".join(f"|{k}|{v}|" for k, v in flags.items())
        with self._explained():
            self.events.add(summary=summary.text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}"), step=self.step)

    def start(self) -> None:
        """Start the clock and the progress line."""
        self.started = self.last = self.printed = time.perf_counter()
        self.bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not self.interactive,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format="{percentage:3.0f}%|{bar}| {n:,}/{total:,} steps [{elapsed}<{remaining}{postfix}]",
        )

    def progress(self) -> dict[str, Any]:
        """Return what a resumed run needs from this one, in JSON types."""
        return {"elapsed": self.elapsed, "episodes": list(self.episodes), "warned": sorted(self.warned)}

    def log(self, metrics: dict[str, jax.Array], results: list[str], finite: Bool[jax.Array, " results"]) -> list[str]:
        """Take the metrics of the update just dispatched (scalars, grayscale images, histograms, traces of dreams) and whether
        each of its results is finite. Write the previous update, and return the names of what was not finite in it."""
        bad = self.flush()
        self.pending, self.results = (metrics, finite), results
        self.learned = self.learned or self._is_update(metrics)
        return bad

    def _is_update(self, metrics: dict[str, Any]) -> bool:
        return LEARNING in metrics or not self.prefills

    def flush(self) -> list[str]:
        """Wait for the metrics taken by `log` and write them. Return the names of losses and results that are not finite."""
        if self.pending is None:
            return []
        (values, finite), self.pending = jax.device_get(self.pending), None
        values = only_measured(values)
        check_shapes(values)
        dreams = {name: values.pop(name) for name in list(values) if name.startswith(traces.PREFIX)}
        pictures = {name: value for name, value in values.items() if value.ndim == 2}
        histograms = {name: value for name, value in values.items() if value.ndim == 1}
        metrics = {name: float(value) for name, value in values.items() if value.ndim == 0}
        # an infinite measurement of the monitor is valid, but cannot be plotted
        metrics = {k: v for k, v in metrics.items() if not (k.startswith(monitor.PREFIX) and math.isinf(v))}
        now = time.perf_counter()
        self.step += self.steps_per_iteration
        if self.first is not None:
            metrics["charts/SPS"] = (self.step - self.first_step) / (now - self.first)
            metrics["charts/SPS_update"] = self.steps_per_iteration / (now - self.last)
        elif self._is_update(metrics):
            # the rate excludes the time before the first update (compilation)
            self.first, self.first_step = now, self.step
            self.say(f"first update after {now - self.started:.1f} s")
        self.elapsed += now - self.last
        self.last = now

        episodes = metrics["charts/episodes"]
        self.episodes.append((episodes, metrics["charts/episodic_return"]))
        count = sum(n for n, _ in self.episodes)
        if count:
            metrics["charts/avg_episodic_return"] = sum(n * value for n, value in self.episodes) / count
        if episodes == 0:
            del metrics["charts/episodic_return"], metrics["charts/episodic_length"]
        elif self.reference is not None:
            episodic_return = metrics["charts/episodic_return"]
            metrics["charts/human_normalized_score"] = self.reference.human_normalized(episodic_return)
            improvement = self.reference.relative_improvement(episodic_return)
            if improvement is not None:
                metrics["charts/relative_improvement"] = improvement
        if dreams:
            metrics |= traces.measures(dreams)
            try:
                pictures[traces.PICTURE] = traces.picture(dreams)
            except Exception as error:  # of any type: a failed figure must not stop the run
                self.say(f"*** no figure of dreams at step {self.step:,}: {one_line(error)} ***")
        self._write(metrics, pictures, histograms)
        self._show(metrics, now)
        losses = [name for name, value in metrics.items() if name.startswith(STOPPING) and not math.isfinite(value)]
        return losses + [name for name, is_finite in zip(self.results, finite, strict=True) if not is_finite]

    def _write(self, metrics: dict[str, float], pictures: dict[str, np.ndarray], histograms: dict[str, np.ndarray]) -> None:
        row = {"step": self.step, "elapsed": self.elapsed} | metrics
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        shown = [summary.scalar(name, value) for name, value in metrics.items()]
        for name, value in pictures.items():
            shown.append(summary.image(name, value, dataformats="HW" if value.ndim == 2 else "CHW"))
        centers, limits = (EDGES[1:] + EDGES[:-1]) / 2, EDGES[1:].tolist()
        for name, counts in histograms.items():
            sums = float(counts.sum()), float(counts @ centers), float(counts @ centers**2)
            shown.append(summary.histogram_raw(name, float(EDGES[0]), float(EDGES[-1]), *sums, limits, counts.tolist()))
        self.check_in_place()
        with self._explained():
            self.metrics.write(json.dumps(row, allow_nan=False) + "\n")
            self.metrics.flush()  # a killed process loses no row
            for one in shown:
                self.events.add(summary=one, step=self.step)
        if self.wandb is not None:
            self.wandb.log(self.step, metrics, pictures, histograms)

    def _show(self, metrics: dict[str, float], now: float) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value) and name not in self.warned]
        if bad and not (self.stops and any(name.startswith(STOPPING) for name in bad)):  # otherwise the run stops with an error
            self.warned.update(bad)
            self.say(f"*** not finite at step {self.step:,}: {', '.join(bad)}; try a lower --learning-rate ***")
        sps = metrics.get("charts/SPS")
        mean = metrics.get("charts/avg_episodic_return")
        shown = f"{'-' if sps is None else f'{sps:,.0f}'} steps/s, return {'-' if mean is None else f'{mean:.1f}'}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(self.steps_per_iteration)
        due = now - self.printed > PLAIN_LINE_SECONDS and sps is not None
        if not self.interactive and (due or self.step == self.total_steps):
            self.printed = now
            left = "" if sps is None else f", {tqdm.format_interval((self.total_steps - self.step) / sps)} left"
            print(f"{self.step:,}/{self.total_steps:,} steps, {shown}{left}", flush=True)

    def say(self, line: str) -> None:
        """Print a line above the progress line."""
        self.bar.write(line, file=sys.stdout) if self.interactive and self.bar is not None else print(line, flush=True)

    def to_disk(self) -> None:
        """Write everything logged so far to disk."""
        with self._explained():
            os.fsync(self.metrics.fileno())
            self.events.records.flush()

    def close(self) -> None:
        """Write everything to disk, and close the files and the progress line."""
        self.bar.close()
        with self._explained(), contextlib.closing(self.metrics), contextlib.closing(self.events.records):
            self.events.records.flush()
