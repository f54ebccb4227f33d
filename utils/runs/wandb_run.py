"""Optional logging to Weights & Biases. Once a run has started, no failure of W&B stops it."""

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils.histograms import EDGES
from utils.runs.flags import RunArgs, UsageError
from utils.runs.launch import one_line

FINISH_SECONDS = 300.0  # to wait for uploads when a run ends


class WandbRun:
    """Starts a W&B run, or resumes it.

    W&B cannot delete what was logged. A resumed run goes back to its last checkpoint and repeats steps. Steps that W&B already
    has are not sent again, so its step axis never goes back.

    Args:
        args: flags.
        name: name of the run.
        config: values for display, filtering and grouping: stored flags, algorithm and script, commit, device, versions.
        known: `identity` of the W&B run to resume (with `logged_to`, the last step that may have been logged), or None.
        say: function that prints a line.

    Raises:
        UsageError: W&B rejects its configuration (no account, an invalid environment variable).
    """

    def __init__(self, args: RunArgs, name: str, config: dict[str, Any], known: dict[str, Any] | None, say: Callable):
        import wandb  # here, because it takes a second and only --track needs it

        self.wandb, self.say, self.known, self.failed = wandb, say, known, False
        self.logged_to = known["logged_to"] if known else 0
        # precedence: flags on the command line, then W&B's environment variables, then our defaults
        given = {
            "project": args.wandb_project_name or (None if "WANDB_PROJECT" in os.environ else "deep-spi"),
            "entity": args.wandb_entity,
            "group": args.wandb_group
            or (None if "WANDB_RUN_GROUP" in os.environ else f"{config['env_id']}__{config['algorithm']}"),
            "tags": args.wandb_tags or None,
            "name": None if "WANDB_NAME" in os.environ else name,
            "save_code": None if "WANDB_SAVE_CODE" in os.environ else True,
        }
        if known:
            given |= {key: known[key] for key in ("id", "project", "entity")}
        given |= {"config": config, "resume": "allow"}
        if "WANDB_FINISH_TIMEOUT" not in os.environ:  # without a network W&B would wait forever at the end
            given |= {"settings": wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)}
        self.run, self.folder, self.offline = None, None, False
        try:
            self._start(given)
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError, ValueError) as error:
            # ValueError: an invalid environment variable
            remedy = "run `wandb login`, set WANDB_MODE=offline, or fix what it reports"
            raise UsageError(f"--track: W&B did not start ({one_line(error)}); {remedy}") from error
        except Exception as error:  # of any type: a run does not depend on W&B
            say(f"*** W&B cannot be reached ({one_line(error)}); logging offline on this machine ***")
            try:
                self._start(given | {"mode": "offline"})
            except Exception as failure:
                say(f"*** W&B cannot start offline either ({one_line(failure)}); training continues without it ***")
                self.failed = True

    def _start(self, given: dict[str, Any]) -> None:
        self.run = self.wandb.init(**given)
        self.run.define_metric("*", step_metric="global_step")
        settings = self.run.settings
        self.folder, self.offline = Path(settings.sync_dir), settings.mode in ("offline", "dryrun")
        if settings.mode != "disabled":
            self.known = {"id": self.run.id, "project": self.run.project, "entity": self.run.entity or None}

    def identity(self) -> dict[str, Any] | None:
        """Return what is needed to resume the W&B run, or None if there is none."""
        return self.known and self.known | {"logged_to": self.logged_to}

    def log(
        self, step: int, metrics: dict[str, float], pictures: dict[str, np.ndarray], histograms: dict[str, np.ndarray]
    ) -> None:
        """Log an update. A failure is reported once and stops logging to W&B."""
        if self.failed or step <= self.logged_to:
            return
        try:
            images = {k: self.wandb.Image(v if v.ndim == 2 else v.transpose(1, 2, 0)) for k, v in pictures.items()}
            counted = {k: self.wandb.Histogram(np_histogram=(v.tolist(), EDGES)) for k, v in histograms.items()}
            self.run.log(metrics | images | counted | {"global_step": step}, step=step)
            self.logged_to = step
        except Exception as error:  # of any type: training continues without W&B
            self._give_up(error)

    def log_video(self, step: int, path: Path) -> None:
        """Log a video file. The metrics of its step may already be logged."""
        if self.failed or step < self.logged_to:
            return
        try:
            self.run.log({"video": self.wandb.Video(str(path)), "global_step": step}, step=step)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        self.say(f"*** W&B logging failed ({one_line(error)}); logging continues to TensorBoard and metrics.jsonl ***")

    def finish(self, exit_code: int) -> None:
        """Report the exit code to W&B, and print how to upload what is left."""
        if self.run is None:
            return
        try:
            self.run.finish(exit_code)
        except Exception as error:
            if not self.failed:
                self.say(f"*** W&B did not record the end of the run ({one_line(error)}) ***")
            self.failed = True
        if self.failed:
            with contextlib.suppress(Exception):
                self.wandb.teardown(exit_code)  # otherwise its errors appear when Python exits
        if self.failed or self.offline:
            self.say(f"W&B: upload the rest with   uv run wandb sync {shlex.quote(str(self.folder))}")
