"""What an offline run wrote for W&B."""

from pathlib import Path
from typing import Any

from utils.runs import wandb_file


def records(folder: Path) -> list[Any]:
    """The records of the one run under the folder, or of the run whose folder it is."""
    (path,) = [*folder.glob("**/offline-run-*/run-*.wandb"), *folder.glob("run-*.wandb")]
    return list(wandb_file.records(path))


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, an entry for each time."""
    (path,) = [*folder.glob("**/offline-run-*/run-*.wandb"), *folder.glob("run-*.wandb")]
    return wandb_file.history(path)


def exit_codes(folder: Path) -> list[int]:
    """How the run ended, as often as it was told."""
    return [record.exit.exit_code for record in records(folder) if record.HasField("exit")]
