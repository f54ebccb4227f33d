"""What a checkpoint costs: seconds of training that each of them takes, and the share of the time at the default interval.

    uv run benchmarks/checkpoints.py            # some 12 minutes on 2 cores

Deep SPI on Breakout at its default size, saving after every update and saving nothing, in turns. The medians of
the time between two updates are compared; the first updates, which compile, are left out.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    """Flags."""

    script: str = "deep_spi.py"
    """which script"""
    env_id: str = "Breakout-v5"
    """the environment"""
    updates: int = 20
    """updates of a run"""
    rounds: int = 2
    """runs of each kind"""


def seconds_between(folder: Path) -> list[float]:
    """From each update to the next."""
    elapsed = [json.loads(line)["elapsed"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [after - before for before, after in zip(elapsed[1:], elapsed[2:], strict=False)]


def main(args: Args) -> None:
    """Prints the two medians, their difference, and its share of 900 seconds."""
    shape = ["--num-envs=128", "--num-steps=8"]  # in every environment
    flags = [f"--env-id={args.env_id}", *shape, f"--total-timesteps={1024 * args.updates}", "--no-save-model"]
    kinds = {"saves": ["--save-every=0"], "does not": ["--keep-checkpoints=0"]}
    times = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as logdir:
        for k in range(args.rounds):
            for kind, more in kinds.items():
                name = f"{kind}-{k}"
                typed = [sys.executable, str(ROOT / args.script), *flags, *more, f"--logdir={logdir}", f"--run-name={name}"]
                subprocess.run(typed, check=True, stdout=subprocess.DEVNULL)
                times[kind] += seconds_between(Path(logdir) / name)
                print(f"{name}: {statistics.median(times[kind]):.3f} s", flush=True)
        size = sum(f.stat().st_size for f in Path(logdir).glob("saves-0/checkpoints/**/*")) / 2  # two are kept
    cost = statistics.median(times["saves"]) - statistics.median(times["does not"])
    print(f"a checkpoint of {size / 2**20:.0f} MiB takes {1000 * cost:.0f} ms: {cost / 900:.4%} of the time at one in 900 s")


if __name__ == "__main__":
    main(tyro.cli(Args))
