"""Measure the cost of a checkpoint: seconds of training, and the fraction of training time at the default interval.

    uv run benchmarks/checkpoints.py            # about 12 minutes on a 2-core machine

The benchmark trains Deep SPI on Breakout at its default size, and alternates between saving after every update and saving
nothing. It compares the median times between two updates. The first updates, which compile, are excluded.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import json  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import dataclass  # noqa: E402

from utils.runs.flags import parse_command, require  # noqa: E402
from utils.runs.launch import fail, run_main  # noqa: E402


@dataclass
class Args:
    """Measure the cost of a checkpoint."""

    script: str = "deep_spi.py"
    """file of the training script"""
    env_id: str = "Breakout-v5"
    """environment"""
    updates: int = 20
    """updates per run"""
    rounds: int = 2
    """number of runs with checkpoints, and of runs without"""


def seconds_between(folder: Path) -> list[float]:
    """Return the seconds from each update to the next, without the first interval and without the prefill of a buffer."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    elapsed = [row["elapsed"] for row in rows if "charts/learning_rate" in row]
    return [after - before for before, after in zip(elapsed[1:], elapsed[2:], strict=False)]


def main(args: Args) -> None:
    """Print the two medians, their difference, and its fraction of the default interval of 900 seconds."""
    require(args.rounds >= 1, f"--rounds {args.rounds}: must be at least 1")
    require(args.updates >= 3, f"--updates {args.updates}: must be at least 3, because the first interval is excluded")
    require((ROOT / args.script).is_file(), f"--script {args.script}: no such file")
    shape = ["--num-envs=128", "--num-steps=8"]  # the same for every environment
    flags = [f"--env-id={args.env_id}", *shape, f"--total-timesteps={1024 * args.updates}", "--no-save-model"]
    kinds = {"saves": ["--save-every=0"], "no-saves": ["--keep-checkpoints=0"]}
    times = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as logdir:
        for k in range(args.rounds):
            for kind, more in kinds.items():
                name = f"{kind}-{k}"
                typed = [sys.executable, str(ROOT / args.script), *flags, *more, f"--logdir={logdir}", f"--run-name={name}"]
                code = subprocess.run(typed, stdout=subprocess.DEVNULL).returncode
                if code != 0:  # the script has printed why
                    fail(f"{args.script} ended with exit code {code}", 1)
                times[kind] += seconds_between(Path(logdir) / name)
                print(f"{name}: {statistics.median(times[kind]):.3f} s", flush=True)
        size = sum(f.stat().st_size for f in Path(logdir).glob("saves-0/checkpoints/**/*")) / 2  # two are kept
    cost = statistics.median(times["saves"]) - statistics.median(times["no-saves"])
    print(f"a checkpoint of {size / 2**20:.0f} MiB takes {1000 * cost:.0f} ms, {cost / 900:.4%} of the time at one every 900 s")


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)))
