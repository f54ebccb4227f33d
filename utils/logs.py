"""Logging: TensorBoard always, Weights & Biases on demand, and a progress line on the terminal."""

import collections
import dataclasses
import errno
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import tensorboardX
from tqdm import tqdm

from utils import dream_traces, monitor, scores
from utils.occasionally import MEASURED
from utils.run import RunArgs, UsageError, describe_device

PLAIN_LINE_SECONDS = 10.0  # between two lines where the output is not a terminal
UPDATES_SHOWN = 20  # the return on the progress line is that of the episodes of so many updates


class Logger:
    """Writes the metrics of a run, one set per iteration, while the device is already busy with the next iteration.

    A context manager: on leaving it, whether the run ended, failed or was interrupted, all is flushed and the terminal says
    where the logs are.

    Raises:
        UsageError: W&B cannot start (on entry).
        OSError: the log folder cannot be written (on entry, or later when the disk is full).
    """

    def __init__(self, args: RunArgs, algorithm: str, steps_per_iteration: int):
        self.args = args
        self.steps_per_iteration = steps_per_iteration
        self.name = f"{args.env_id}__{algorithm}__{args.seed}__{int(time.time())}"
        self.folder = Path(args.logdir) / self.name
        self.reference = scores.reference(args.env_id)
        self.episodes = collections.deque(maxlen=UPDATES_SHOWN)  # number and mean return, of each update
        self.pending = None
        self.step = 0
        self.warned = False
        self.first = None  # when the first update had ended
        self.run = None

    def __enter__(self) -> "Logger":
        if self.folder.exists():  # a run of the same flags that started in the same second
            self.folder = self.folder.with_name(f"{self.name}_{os.getpid()}")
        self.folder.mkdir(parents=True)
        if self.args.track:
            self._start_wandb()
        # a queue too long to fill up within an iteration: see `_writer_lives`
        self.writer = tensorboardX.SummaryWriter(str(self.folder), max_queue=10_000)
        rows = "\n".join(f"|{k}|{v}|" for k, v in dataclasses.asdict(self.args).items())
        self.writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}")
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

    def __exit__(self, kind, error, traceback) -> None:
        # a second Ctrl-C must not cut short what follows (whoever runs a script through uv may send two with one key)
        heeding = (
            signal.signal(signal.SIGINT, signal.SIG_IGN) if threading.current_thread() is threading.main_thread() else None
        )
        try:
            if kind is KeyboardInterrupt:
                self._say("stopping after this update ...")
            if kind in (None, KeyboardInterrupt):
                self._flush_pending()
            if kind is None or not issubclass(kind, jax.errors.JaxRuntimeError):
                # an iteration may still be running, and the environments that it steps must not be freed before it ends
                jax.effects_barrier()
        finally:
            self._close(failed=kind is not None)
            if heeding is not None:
                signal.signal(signal.SIGINT, heeding)

    def _close(self, failed: bool) -> None:
        self.bar.close()
        if self._writer_lives():
            self.writer.close()
        else:  # nothing more can be written, so nothing may be tried, or waited for, when Python exits
            events = self.writer.file_writer.event_writer
            events._closed = True
            events._event_queue.cancel_join_thread()
        if self.run is not None:
            self.run.finish(exit_code=int(failed))
        print(f"{'stopped' if failed else 'ended'} after {self.step:,} steps")
        print(f"logs: {self.folder}   (uv run tensorboard --logdir {self.args.logdir})", flush=True)

    def log(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the iteration just dispatched (scalars, grey pictures, traces of dreams) and writes those of the
        one before it."""
        self._flush_pending()
        self.pending = metrics

    def _flush_pending(self) -> None:
        if self.pending is None:
            return
        values = jax.device_get(self.pending)
        self.pending = None
        for prefix in (monitor.PREFIX, dream_traces.PREFIX):
            if values.pop(prefix + MEASURED, 1.0) == 0:
                values = {name: value for name, value in values.items() if not name.startswith(prefix)}
        traces = {name: values.pop(name) for name in list(values) if name.startswith(dream_traces.PREFIX)}
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
        if episodes > 0:
            episodic_return = metrics["charts/episodic_return"]
            if self.reference is not None:
                metrics["charts/human_normalized_score"] = self.reference.human_normalized(episodic_return)
                metrics["charts/relative_improvement"] = self.reference.relative_improvement(episodic_return)
        else:
            del metrics["charts/episodic_return"], metrics["charts/episodic_length"]
        if not self._writer_lives():
            raise OSError(
                errno.ENOSPC, "the log could not be written (is the disk full?); the run has stopped", str(self.folder)
            )
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, self.step)
        for name, value in pictures.items():
            self.writer.add_image(name, value, self.step, dataformats="HW")
        for name, figure in (dream_traces.draw(traces) if traces else {}).items():
            self.writer.add_figure(name, figure, self.step)
        self._show(metrics, now)

    def _writer_lives(self) -> bool:
        # tensorboardX writes in a thread of its own. An error ends that thread without a word, and whoever goes on writing
        # waits for it for ever
        return self.writer.file_writer.event_writer._worker.is_alive()

    def _show(self, metrics: dict[str, float], now: float) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad and not self.warned:
            self.warned = True
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

        try:
            self.run = wandb.init(
                project=self.args.wandb_project_name,
                entity=self.args.wandb_entity,
                group=self.args.wandb_group,
                tags=self.args.wandb_tags,
                name=self.name,
                dir=self.args.logdir,
                config=dataclasses.asdict(self.args),
                sync_tensorboard=True,
                save_code=True,
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"--track: W&B did not start ({reason}); run `wandb login` or set WANDB_MODE=offline") from error
