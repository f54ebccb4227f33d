"""Profile an update on the current device, by layer and by forward pass or gradient.

    uv run benchmarks/profile_update.py --script deep_spi --env-id Breakout-v5

JAX's profiler records some updates. XLA stores what each operation of the compiled program was compiled from: its layer, and
whether it belongs to the forward pass or the gradient. A fused operation counts for the layer of its result. The last line is
the time in which the profiler saw no operation. On a CPU, XLA runs some matrix products and convolutions asynchronously, and
the profiler sees only their start.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import re  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from collections import Counter  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Literal  # noqa: E402

import jax  # noqa: E402

from benchmarks.throughput import Setting, seconds  # noqa: E402
from utils.runs.flags import parse_command, require  # noqa: E402
from utils.runs.launch import describe_device, run_main  # noqa: E402

INSTRUCTION = re.compile(r"%(?P<name>[\w.-]+) = .*? (?P<kind>[\w-]+)\(.*?metadata=\{op_name=\"(?P<source>[^\"]*)\"")
CONTAINERS = {"while", "call", "conditional"}  # their operations are counted instead
PASS = re.compile(r"(?P<gradient>transpose\()?jvp\((?P<network>[^()]+)\)\)?/(?P<layer>[^/]+)")


@dataclass
class Args:
    """Profile an update by layer."""

    script: Literal["ppo", "deep_mdp", "deep_spi", "dream_spi"] = "ppo"
    """script whose update is profiled"""
    env_id: str = "Breakout-v5"
    """environment"""
    updates: int = 3
    """number of profiled updates"""
    rows: int = 25
    """printed lines, longest times first"""


def part_of(source: str) -> str:
    """Return a readable name for the source of an operation."""
    found = PASS.search(source)
    if found is None:
        return source.split("/")[-1]
    return f"{found['network']}, {found['layer']}, {'gradient' if found['gradient'] else 'forward'}"


def time_by_part(setting: Setting, updates: int) -> tuple[Counter, float]:
    """Return the seconds of an update by part, and in total."""
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
    """Profile the updates and print the times."""
    require(args.updates >= 1, f"--updates {args.updates}: must be at least 1")
    print(describe_device())
    warnings.filterwarnings("ignore", "builtin type event_stats", DeprecationWarning)  # from JAX's own code
    taken, passed = time_by_part(Setting(args.script, env_id=args.env_id), args.updates)
    print(f"update: {passed:.3f} s")
    for part, took in taken.most_common(args.rows):
        print(f"{took * 1e3:9.1f} ms {took / passed:5.0%}  {part}")
    if (rest := passed - taken.total()) > 0:
        print(f"{rest * 1e3:9.1f} ms {rest / passed:5.0%}  not seen by the profiler")


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)))
