"""Logging: TensorBoard always, Weights & Biases on demand, and a progress line on the terminal."""

import collections
import contextlib
import errno
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tensorboardX.utils import figure_to_image
from tqdm import tqdm

from utils.dreams import traces
from utils.guarantees import monitor
from utils.occasionally import only_measured
from utils.runs import scores
from utils.runs.flags import RunArgs, UsageError
from utils.runs.launch import describe_device, one_line

PLAIN_LINE_SECONDS = 10.0  # between two lines where the output is not a terminal
FLUSH_SECONDS = 10.0  # between two times at which all that was logged is on the disk
UPDATES_SHOWN = 20  # the return on the progress line is that of the episodes of so many updates

logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # it would say of every NaN what we say once


class EventFile:
    """A TensorBoard file, written where it is called: a full disk is an error there, and not in a thread that nobody watches.

    Raises:
        OSError: it cannot be written (from every method).
    """

    def __init__(self, folder: Path):
        path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter(str(path))
        self.flushed = 0.0
        self._write(Event(file_version="brain.Event:2"))

    def add(self, values: Any, step: int) -> None:
        """Adds what a function of `tensorboardX.summary` made."""
        self._write(Event(summary=values, step=step))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with self._explained():
            self.records.write(event.SerializeToString())
            if event.wall_time - self.flushed > FLUSH_SECONDS:
                self.flushed = event.wall_time
                self.records.flush()

    def close(self) -> None:
        """All is on the disk, or it is an error."""
        with self._explained():
            try:
                self.records.flush()
            finally:
                self.records.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = f"the log could not be written ({error.strerror}; is the disk full?), and the run has stopped"
            raise OSError(error.errno, said, self.records.path) from None


class Logger:
    """Writes the metrics of a run, one set per iteration, while the device is already busy with the next iteration.

    A context manager. On leaving it, whether the run ended, failed or was interrupted, all is flushed, the terminal says where
    the logs are, and W&B how it ended: once, and after the last thing that can fail.

    Ctrl-C is noted, and acted on at the end of the next `log`, as a KeyboardInterrupt.

    Raises:
        UsageError: W&B cannot start (on entry).
        OSError: the log folder cannot be written (on entry, or whenever the disk is full).
    """

    def __init__(self, args: RunArgs, algorithm: str, steps_per_iteration: int):
        self.args = args
        self.steps_per_iteration = steps_per_iteration
        self.name = f"{args.env_id}__{algorithm}__{args.seed}__{int(time.time())}"
        self.logdir = Path(args.logdir).expanduser()
        self.folder = self.logdir / self.name
        self.reference = scores.reference(args.env_id, args.stochastic_env)
        self.episodes = collections.deque(maxlen=UPDATES_SHOWN)  # number and mean return, of each update
        self.pending = None
        self.step = 0
        self.warned = set()  # names of metrics that were no numbers
        self.first = None  # when the first update had ended
        self.run = None
        self.wandb_failed = False
        self.interrupted = False
        # a path may hold what no encoding has
        self.flags = {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in vars(args).items()}

    def __enter__(self) -> "Logger":
        # Ctrl-C at W&B's question for an account is an answer
        self.handler = _heed_interrupts(signal.default_int_handler)
        made = False
        try:
            try:
                self.folder.mkdir(parents=True)
            except FileExistsError:  # a run of the same flags that started in the same second
                self.folder = self.folder.with_name(f"{self.name}_{os.getpid()}")
                self.folder.mkdir()
            made = True
            self.events = EventFile(self.folder)
            rows = "\n".join(f"|{k}|{v}|" for k, v in self.flags.items())
            self.events.add(summary.text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}"), 0)
            if self.args.track:
                self._start_wandb()
            _heed_interrupts(self._interrupt)
        except BaseException:
            if self.run is not None:
                self.run.finish(1)
            if made:
                shutil.rmtree(self.folder, ignore_errors=True)
            _heed_interrupts(self.handler)
            raise
        iterations = self.args.total_timesteps // self.steps_per_iteration
        self.total_steps = iterations * self.steps_per_iteration
        print(f"{self.name}: {self.total_steps:,} steps in {iterations:,} updates\n{describe_device()}")
        print("compiling ...", flush=True)
        self.interactive = sys.stdout.isatty()
        self.started = self.last = self.printed = time.perf_counter()
        self.bar = tqdm(
            total=self.total_steps,
            unit="step",
            disable=not self.interactive,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format="{percentage:3.0f}%|{bar}| {n:,}/{total:,} steps [{elapsed}<{remaining}{postfix}]",
        )
        return self

    def _interrupt(self, *_) -> None:
        self.interrupted = True

    def __exit__(self, kind, error, traceback) -> None:
        failure = error

        def attempt(action, *args):  # all that follows is tried, whatever fails; what failed first is what is raised
            nonlocal failure
            try:
                action(*args)
            except BaseException as raised:
                if failure is None or isinstance(failure, KeyboardInterrupt):
                    failure = raised

        if isinstance(error, KeyboardInterrupt):
            self._say("stopping after this update ...")
        attempt(self._flush_pending)
        # an iteration may still be running, and the environments that it steps must not be freed before it ends
        attempt(jax.effects_barrier)
        attempt(self.bar.close)
        attempt(self.events.close)
        if self.run is not None:
            attempt(self._finish_wandb, int(failure is not None))
        print(f"{'ended' if failure is None else 'stopped'} after {self.step:,} steps")
        print(f"logs: {self.folder}   (uv run tensorboard --logdir {shlex.quote(str(self.logdir))})", flush=True)
        _heed_interrupts(self.handler)
        if failure is not error:
            raise failure

    def log(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the iteration just dispatched (scalars, grey pictures, traces of dreams) and writes those of the
        one before it.

        Raises:
            KeyboardInterrupt: Ctrl-C was typed since the last call.
        """
        self._flush_pending()
        self.pending = metrics
        if self.interrupted:
            raise KeyboardInterrupt

    def _flush_pending(self) -> None:
        if self.pending is None:
            return
        values = only_measured(jax.device_get(self.pending))
        self.pending = None
        dreams = {name: values.pop(name) for name in list(values) if name.startswith(traces.PREFIX)}
        pictures = {name: value for name, value in values.items() if value.ndim == 2}
        metrics = {name: float(value) for name, value in values.items() if name not in pictures}
        # what is not bounded is no number to draw, and no mistake
        metrics = {k: v for k, v in metrics.items() if not (k.startswith(monitor.PREFIX) and math.isinf(v))}
        now = time.perf_counter()
        self.step += self.steps_per_iteration
        if self.first is not None:
            metrics["charts/SPS"] = (self.step - self.first_step) / (now - self.first)
            metrics["charts/SPS_update"] = self.steps_per_iteration / (now - self.last)
        elif "charts/learning_rate" in metrics:  # and was no rollout that only fills a buffer
            # the rate leaves out what came before the first update: compilation
            self.first, self.first_step = now, self.step
            self._say(f"first update after {now - self.started:.1f} s")
        self.last = now

        episodes = metrics.pop("episodes")
        self.episodes.append((episodes, metrics["charts/episodic_return"]))
        if episodes == 0:
            del metrics["charts/episodic_return"], metrics["charts/episodic_length"]
        elif self.reference is not None:
            episodic_return = metrics["charts/episodic_return"]
            metrics["charts/human_normalized_score"] = self.reference.human_normalized(episodic_return)
            improvement = self.reference.relative_improvement(episodic_return)
            if improvement is not None:
                metrics["charts/relative_improvement"] = improvement
        if dreams:
            pictures |= {name: figure_to_image(figure) for name, figure in traces.draw(dreams).items()}
        self._write(metrics, pictures)
        self._show(metrics, now)

    def _write(self, metrics: dict[str, float], pictures: dict[str, np.ndarray]) -> None:
        for name, value in metrics.items():
            self.events.add(summary.scalar(name, value), self.step)
        for name, value in pictures.items():
            self.events.add(summary.image(name, value, dataformats="HW" if value.ndim == 2 else "CHW"), self.step)
        if self.run is not None and not self.wandb_failed:
            try:
                images = {k: self.wandb.Image(v if v.ndim == 2 else v.transpose(1, 2, 0)) for k, v in pictures.items()}
                self.run.log(metrics | images | {"global_step": self.step})
            except Exception as error:  # of whatever kind: training goes on without W&B
                self.wandb_failed = True
                self._say(f"*** W&B takes no more ({one_line(error)}); TensorBoard's file goes on ***")

    def _show(self, metrics: dict[str, float], now: float) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value) and name not in self.warned]
        if bad:
            self.warned.update(bad)
            self._say(f"*** not finite at step {self.step:,}: {', '.join(bad)}; try a lower --learning-rate ***")
        sps = metrics.get("charts/SPS")
        count = sum(n for n, _ in self.episodes)
        mean = sum(n * value for n, value in self.episodes) / count if count else None
        shown = f"{'-' if sps is None else f'{sps:,.0f}'} steps/s, return {'-' if mean is None else f'{mean:.1f}'}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(self.steps_per_iteration)
        due = now - self.printed > PLAIN_LINE_SECONDS and sps is not None
        if not self.interactive and (due or self.step == self.total_steps):
            self.printed = now
            left = "" if sps is None else f", {tqdm.format_interval((self.total_steps - self.step) / sps)} left"
            print(f"{self.step:,}/{self.total_steps:,} steps, {shown}{left}", flush=True)

    def _say(self, line: str) -> None:
        self.bar.write(line, file=sys.stdout) if self.interactive else print(line, flush=True)

    def _start_wandb(self) -> None:
        import wandb  # here, because it takes a second to import and most first runs do without

        self.wandb = wandb
        # what was not typed is left to W&B's own environment variables, and to our defaults where these say nothing either
        given = {
            "project": self.args.wandb_project_name or (None if "WANDB_PROJECT" in os.environ else "deep-spi"),
            "entity": self.args.wandb_entity,
            "group": self.args.wandb_group,
            "tags": self.args.wandb_tags or None,
            "name": None if "WANDB_NAME" in os.environ else self.name,
            "save_code": None if "WANDB_SAVE_CODE" in os.environ else True,
        }
        try:
            self.run = wandb.init(config=self.flags, **given)
            self.run.define_metric("*", step_metric="global_step")
        except (wandb.errors.Error, ValueError) as error:  # ValueError: of its environment variables
            remedy = "run `wandb login`, set WANDB_MODE=offline, or mend what it names"
            raise UsageError(f"--track: W&B did not start ({one_line(error)}); {remedy}") from error

    def _finish_wandb(self, exit_code: int) -> None:
        try:
            self.run.finish(exit_code)
        except Exception as error:
            said = f"W&B was not told how the run ended ({one_line(error)}); TensorBoard's file is complete"
            raise OSError(errno.EIO, said) from None


def _heed_interrupts(handler: Any) -> Any:
    """Sets what Ctrl-C does, where anything may, and returns what it did before."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is threading.main_thread() and before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    return before
