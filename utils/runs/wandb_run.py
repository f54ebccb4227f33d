"""Optional logging to Weights & Biases. Once a run has started, no failure of W&B stops it."""

import contextlib
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils.histograms import EDGES
from utils.runs import wandb_file
from utils.runs.flags import RunArgs, UsageError
from utils.runs.launch import one_line

FINISH_SECONDS = 300.0  # to wait for uploads when a run ends


def add_to_summary(identity: dict[str, Any], values: dict[str, Any]) -> None:
    """Set values in the summary of a W&B run that has ended; `identity` is its entry in run.json.

    Raises:
        UsageError: W&B cannot be reached, or rejects its configuration.
    """
    import wandb

    known = {key: identity[key] for key in ("id", "project", "entity")}
    try:
        with wandb.init(**known, resume="allow") as run:
            run.summary.update(values)
    except Exception as error:  # of any type
        raise UsageError(f"--track: W&B did not take the results ({one_line(error)}); run `wandb login`, then repeat") from None


class WandbRun:
    """Starts a W&B run, or resumes it.

    W&B cannot delete what was logged. A resumed run goes back to its last checkpoint and repeats steps. Steps that W&B already
    has are not sent again, so its step axis never goes back. Steps that it lacks (a signal may end W&B's own process first) are
    sent from metrics.jsonl; see `send_missing`.

    Args:
        args: flags.
        name: name of the run.
        group: default of --wandb-group.
        config: values for display and filtering: stored flags, algorithm and script, commit, device, versions.
        known: `identity` of the W&B run to resume (with `logged_to`, the last step that may have been logged), or None.
        say: function that prints a line.

    Raises:
        UsageError: W&B rejects its configuration (no account, an invalid environment variable).
    """

    def __init__(
        self, args: RunArgs, name: str, group: str, config: dict[str, Any], known: dict[str, Any] | None, say: Callable
    ):
        import wandb  # here, because it takes a second and only --track needs it

        self.wandb, self.say, self.known, self.failed = wandb, say, known, False
        self.logged_to = known["logged_to"] if known else 0
        # precedence: flags on the command line, then W&B's environment variables, then our defaults
        given = {
            "project": args.wandb_project_name or (None if "WANDB_PROJECT" in os.environ else "deep-spi"),
            "entity": args.wandb_entity,
            "group": args.wandb_group or (None if "WANDB_RUN_GROUP" in os.environ else group),
            "tags": args.wandb_tags or None,
            "name": None if "WANDB_NAME" in os.environ else name,
            "save_code": None if "WANDB_SAVE_CODE" in os.environ else True,
        }
        if known:
            given |= {key: known[key] for key in ("id", "project", "entity")}
        given |= {"config": config, "resume": "allow"}
        if "WANDB_FINISH_TIMEOUT" not in os.environ:  # without a network W&B would wait forever at the end
            given |= {"settings": wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True)}
        self.run, self.folder, self.offline, self.saves_code = None, None, False, False
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
        if known and self.run is not None:
            self.logged_to = self._last_step_there(known)
        if self.known is not None:
            self.known |= {"since": self.logged_to}

    def _last_step_there(self, known: dict[str, Any]) -> int:
        """Return the last step that W&B is known to have: its server, or else its last file on this machine."""
        if self.run.resumed:
            return max(0, self.run.starting_step - 1)
        written = wandb_file.last_step(Path(known["file"])) if "file" in known else None
        return known["logged_to"] if written is None else max(written, known["since"])

    def _start(self, given: dict[str, Any]) -> None:
        self.run = self.wandb.init(**given)
        self.run.define_metric("*", step_metric="global_step")
        settings = self.run.settings
        self.folder, self.offline = Path(settings.sync_dir), settings.mode in ("offline", "dryrun")
        self.saves_code = bool(settings.save_code)
        if settings.mode != "disabled":
            self.known = {"id": self.run.id, "project": self.run.project, "entity": self.run.entity or None}
            self.known |= {"file": str(settings.sync_file)}

    def identity(self) -> dict[str, Any] | None:
        """Return what is needed to resume the W&B run, or None if there is none."""
        return self.known and self.known | {"logged_to": self.logged_to}

    def log(
        self, step: int, metrics: dict[str, float], pictures: dict[str, np.ndarray], histograms: dict[str, np.ndarray]
    ) -> None:
        """Log an update. A failure is reported once and stops logging to W&B."""
        if step <= self.logged_to:
            return

        def send():
            images = {k: self.wandb.Image(v if v.ndim == 2 else v.transpose(1, 2, 0)) for k, v in pictures.items()}
            counted = {k: self.wandb.Histogram(np_histogram=(v.tolist(), EDGES)) for k, v in histograms.items()}
            self.run.log(metrics | images | counted | {"global_step": step}, step=step)
            self.logged_to = step

        self._attempt(send)

    def send_missing(self, rows: list[dict[str, Any]]) -> None:
        """Log those rows of metrics.jsonl that W&B lacks, and say so. Pictures and histograms are not in this file."""
        missing = [row for row in rows if row["step"] > self.logged_to]
        for row in missing:
            values = {k: math.nan if v is None else v for k, v in row.items() if k not in ("step", "elapsed")}
            self.log(row["step"], values, {}, {})
        if missing and not self.failed:
            self.say(f"W&B lacked the last {len(missing)} updates before this step; sent again from metrics.jsonl")

    def describe(self, **values: Any) -> None:
        """Add values to the config of the W&B run."""
        self._attempt(lambda: self.run.config.update(values, allow_val_change=True))

    def summarize(self, **values: Any) -> None:
        """Set values in the summary of the W&B run."""
        self._attempt(lambda: self.run.summary.update(values))

    def save_files(self, kind: str, files: dict[str, Path]) -> None:
        """Save files in a W&B artifact of this type, under the given names."""

        def send():
            artifact = self.wandb.Artifact(f"{kind}-{self.run.id}", type=kind)
            for name, path in files.items():
                artifact.add_file(str(path), name=name)
            self.run.log_artifact(artifact)

        self._attempt(send)

    def log_video(self, step: int, path: Path) -> None:
        """Log a video file. The metrics of its step may already be logged."""
        if step >= self.logged_to:
            self._attempt(lambda: self.run.log({"video": self.wandb.Video(str(path)), "global_step": step}, step=step))

    def _attempt(self, send: Callable[[], None]) -> None:
        """Send something to W&B; after the first failure, nothing more is sent."""
        if self.failed:
            return
        try:
            send()
        except Exception as error:  # of any type: training continues without W&B
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
