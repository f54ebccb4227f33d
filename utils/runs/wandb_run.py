"""A run's copy in Weights & Biases, on demand. Whatever happens there, training goes on."""

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

FINISH_SECONDS = 300.0  # for what is not uploaded yet when a run ends


class WandbRun:
    """Starts W&B's run, or goes on with it.

    W&B cannot take back what it was told. A continued run goes back to its last checkpoint, so what it logs again on the way
    to where it had been is left out there: the axis of steps never goes back.

    Args:
        args: flags.
        name: of the run.
        config: to show, and to filter and group runs by: flags as stored, algorithm and script, commit, device, versions.
        known: what `identity` was when the run started (with `logged_to`, the last step that may have been logged); or None.
        say: prints a line.

    Raises:
        UsageError: W&B refuses what it is given (no account, a wrong environment variable).
    """

    def __init__(self, args: RunArgs, name: str, config: dict[str, Any], known: dict[str, Any] | None, say: Callable):
        import wandb  # here, because it takes a second to import and most first runs do without

        self.wandb, self.say, self.known, self.failed = wandb, say, known, False
        self.logged_to = known["logged_to"] if known else 0
        # what was not typed is left to W&B's own environment variables, and to our defaults where these say nothing either
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
        if "WANDB_FINISH_TIMEOUT" not in os.environ:  # without a network it would wait for ever at the end
            given |= {"settings": wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)}
        self.run, self.folder, self.offline = None, None, False
        try:
            self._start(given)
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError, ValueError) as error:
            # ValueError: of its environment variables
            remedy = "run `wandb login`, set WANDB_MODE=offline, or mend what it names"
            raise UsageError(f"--track: W&B did not start ({one_line(error)}); {remedy}") from error
        except Exception as error:  # of whatever kind: that W&B is not there ends no run
            say(f"*** W&B cannot be reached ({one_line(error)}); its run is kept on this machine ***")
            try:
                self._start(given | {"mode": "offline"})
            except Exception as failure:
                say(f"*** nor can W&B be started offline ({one_line(failure)}): this goes on without it ***")
                self.failed = True

    def _start(self, given: dict[str, Any]) -> None:
        self.run = self.wandb.init(**given)
        self.run.define_metric("*", step_metric="global_step")
        settings = self.run.settings
        self.folder, self.offline = Path(settings.sync_dir), settings.mode in ("offline", "dryrun")
        if settings.mode != "disabled":
            self.known = {"id": self.run.id, "project": self.run.project, "entity": self.run.entity or None}

    def identity(self) -> dict[str, Any] | None:
        """What continues the run; None if there is nothing to continue."""
        return self.known and self.known | {"logged_to": self.logged_to}

    def log(
        self, step: int, metrics: dict[str, float], pictures: dict[str, np.ndarray], histograms: dict[str, np.ndarray]
    ) -> None:
        """Logs an update. If W&B takes no more, that is said once."""
        if self.failed or step <= self.logged_to:
            return
        try:
            images = {k: self.wandb.Image(v if v.ndim == 2 else v.transpose(1, 2, 0)) for k, v in pictures.items()}
            counted = {k: self.wandb.Histogram(np_histogram=(v.tolist(), EDGES)) for k, v in histograms.items()}
            self.run.log(metrics | images | counted | {"global_step": step}, step=step)
            self.logged_to = step
        except Exception as error:  # of whatever kind: training goes on without W&B
            self._give_up(error)

    def log_video(self, step: int, path: Path) -> None:
        """Logs a video file, as `log` does; the numbers of its step may be there already."""
        if self.failed or step < self.logged_to:
            return
        try:
            self.run.log({"video": self.wandb.Video(str(path)), "global_step": step}, step=step)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        self.say(f"*** W&B takes no more ({one_line(error)}); TensorBoard's file and metrics.jsonl go on ***")

    def finish(self, exit_code: int) -> None:
        """Tells W&B how the run ended, and says what is left to upload."""
        if self.run is None:
            return
        try:
            self.run.finish(exit_code)
        except Exception as error:
            if not self.failed:
                self.say(f"*** W&B was not told how the run ended ({one_line(error)}) ***")
            self.failed = True
        if self.failed:
            with contextlib.suppress(Exception):
                self.wandb.teardown(exit_code)  # or Python's exit shows what it raises
        if self.failed or self.offline:
            self.say(f"W&B: what it was given is uploaded by   uv run wandb sync {shlex.quote(str(self.folder))}")
