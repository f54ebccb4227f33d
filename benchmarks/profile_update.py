"""Where the time of an update goes, by layer and direction, on whatever device is there.

    uv run benchmarks/profile_update.py --script deep_spi --env-id Breakout-v5

JAX's profiler watches some updates. For each operation of the compiled program XLA notes what it was compiled from: that gives
the layer, and whether it is of the forward pass or of the gradient. What is fused counts for the layer of its result. The
last line is the time at which none of them was seen at work: on a CPU XLA starts some products and convolutions and does not
wait for them, and the profiler sees only the start of those.
"""

import re
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.throughput import Setting, seconds  # noqa: E402
from utils.runs.launch import describe_device, run_main  # noqa: E402

INSTRUCTION = re.compile(r"%(?P<name>[\w.-]+) = .*? (?P<kind>[\w-]+)\(.*?metadata=\{op_name=\"(?P<source>[^\"]*)\"")
CONTAINERS = {"while", "call", "conditional"}  # whose time is that of what they hold
PASS = re.compile(r"(?P<gradient>transpose\()?jvp\((?P<network>[^()]+)\)\)?/(?P<layer>[^/]+)")


@dataclass
class Args:
    """Flags of the profile."""

    script: Literal["ppo", "deep_mdp", "deep_spi", "dream_spi"] = "ppo"
    """whose update"""
    env_id: str = "Breakout-v5"
    """on which environment"""
    updates: int = 3
    """how many are watched"""
    rows: int = 25
    """how many lines are printed, the longest times first"""


def part_of(source: str) -> str:
    """A name for what an operation was compiled from."""
    found = PASS.search(source)
    if found is None:
        return source.split("/")[-1]
    return f"{found['network']}, {found['layer']}, {'gradient' if found['gradient'] else 'forward'}"


def time_by_part(setting: Setting, updates: int) -> tuple[Counter, float]:
    """Seconds of an update by part, and all that pass in it."""
    sources = {}
    for line in setting.learn.as_text().splitlines():
        if (found := INSTRUCTION.search(line)) and found["kind"] not in CONTAINERS:
            sources[found["name"]] = found["source"]
    setting.run()
    taken, passed = Counter(), 0.0
    for _ in range(updates):
        state, steps = jax.block_until_ready(setting.rollout(setting.state))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                took, (setting.state, _) = seconds(setting.learn, state, steps)
            (path,) = Path(folder).rglob("*.xplane.pb")
            profile = jax.profiler.ProfileData.from_file(str(path))
        passed += took / updates
        for event in (event for plane in profile.planes for line in plane.lines for event in line.events):
            name = dict(event.stats).get("hlo_op", event.name)
            if name in sources:
                taken[part_of(sources[name])] += event.duration_ns / 1e9 / updates
    return taken, passed


def main(args: Args) -> None:
    """Measures and prints."""
    print(describe_device())
    warnings.filterwarnings("ignore", "builtin type event_stats", DeprecationWarning)  # of JAX's own
    taken, passed = time_by_part(Setting(args.script, env_id=args.env_id), args.updates)
    print(f"an update: {passed:.3f} s")
    for part, took in taken.most_common(args.rows):
        print(f"{took * 1e3:9.1f} ms {took / passed:5.0%}  {part}")
    if (rest := passed - taken.total()) > 0:
        print(f"{rest * 1e3:9.1f} ms {rest / passed:5.0%}  not seen")


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args)))
