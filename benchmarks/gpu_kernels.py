"""Count the GPU kernels of an update by their purpose. This needs NVIDIA's packages, but no GPU.

    uv run --extra cuda13 benchmarks/gpu_kernels.py --settings ppo deep_spi "deep_spi --num-envs 512"
    uv run --extra cuda13 benchmarks/gpu_kernels.py --settings "deep_spi --num-devices 4"    # also exchanges between devices

An update of these networks launches thousands of kernels, most of which take 1 to 3 microseconds even for little work. The
counts do not show how long the large kernels take; that needs a GPU. XLA compiles for an H200 that need not be present. It then
chooses algorithms (for matrix products) by rules instead of timings, so counts differ slightly from those on a real H200.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import os  # noqa: E402
import re  # noqa: E402
from collections import Counter  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from benchmarks.profile_update import part_of  # noqa: E402
from benchmarks.throughput import SCRIPTS, parse_setting  # noqa: E402
from envs.protocol import DEVICES  # noqa: E402
from envs.registry import make_env  # noqa: E402
from utils.devices import placement, use_devices  # noqa: E402
from utils.runs.flags import check_flags, make_args, parse_command, require  # noqa: E402
from utils.runs.launch import run_main  # noqa: E402

H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
NO_KERNEL = {"add-dependency", "after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter", "tuple"}
NO_KERNEL |= {"partition-id", "replica-id"}
BETWEEN = "between devices: "
EXCHANGES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%[\w.-]+ = .*? (?P<kind>[a-z][\w-]*)\(")
CALLED = re.compile(r"(?:to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)|branch_computations=\{(.*?)\}")


@dataclass
class Args:
    """Count the GPU kernels of an update."""

    settings: tuple[str, ...] = ("ppo", "deep_mdp", "deep_spi", "dream_spi")
    """scripts to compile (ppo, deep_mdp, deep_spi, dream_spi); quote a script to give it flags"""
    env_id: str = "Breakout-v5"
    """environment"""
    rows: int = 10
    """printed lines per setting, largest counts first; exchanges between devices are always printed"""


def count_kernels(hlo: str) -> Counter:
    """Count the kernels that a compiled program launches, by part. Each instruction counts as one kernel, although those of
    NVIDIA's libraries may launch more. The body of a loop counts once per iteration (once if their number is unknown). All
    branches of a conditional count."""
    computations, entry, lines = {}, "", []
    for line in hlo.splitlines():
        if found := COMPUTATION.match(line):
            lines = computations[found["name"]] = []
            entry = found["name"] if found["entry"] else entry
        else:
            lines.append(line)

    def count(name: str) -> Counter:
        total = Counter()
        for line in computations[name]:
            found = INSTRUCTION.match(line)
            if not found or found["kind"] in NO_KERNEL or found["kind"].endswith("-done"):
                continue
            kind = found["kind"].removesuffix("-start")
            if kind in ("while", "call", "conditional"):
                if trips := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
                    line = re.sub(r"condition=%[\w.-]+", "", line)  # not evaluated if the trip count is known
                for one, several in CALLED.findall(line):
                    for called in [one] if one else re.findall(r"%([\w.-]+)", several):
                        for part, kernels in count(called).items():
                            total[part] += kernels * (int(trips[1]) if trips else 1)
            elif kind in EXCHANGES:
                total[f"{BETWEEN}{kind}"] += 1
            else:
                source = re.search(r'op_name="([^"]*)"', line)
                total[part_of(source[1]) if source else "(internal to XLA)"] += 1
        return total

    return count(entry)


def compile_update(name: str, flags: dict) -> str:
    """Compile a script's update for the GPUs described above, and return XLA's text of the program that each of them runs.

    Raises:
        UsageError: NVIDIA's packages are missing, or the flags are inconsistent.
    """
    script = SCRIPTS[name]
    args = make_args(script.Args, **flags)
    check_flags(args)
    try:
        gpus = topologies.get_topology_desc("H200", "cuda", target_config=H200, topology=f"1x1x{args.num_devices}").devices
    except NotImplementedError:
        require(False, "NVIDIA's packages are missing: use uv run --extra cuda13 benchmarks/gpu_kernels.py, or --extra cuda12")
    with use_devices(args.num_devices, gpus):
        env = make_env(args)
        agent, optimizer = script.make_agent(args, env.num_actions, env.obs_parts), script.make_optimizer(args)
        state = jax.eval_shape(lambda: script.init_state(args, env, agent, optimizer))
        given = jax.eval_shape(partial(script.rollout, env=env, agent=agent, args=args), state)
        if args.num_devices == 1:
            places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(gpus[0]), given)
        else:
            by_env = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec(None, DEVICES))
            places = placement(given[0]), jax.tree.map(lambda _: by_env, given[1])
        given = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given, places)
        learn = lambda state, steps: script.learn(state, steps, env, agent, optimizer, args)  # noqa: E731
        return jax.jit(learn, donate_argnums=0).lower(*given).compile().as_text()


def main(args: Args) -> None:
    """Compile each setting and print its kernel counts."""
    require(len(args.settings) > 0, "--settings: name at least one")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # that check of package versions needs a driver
    jax.config.update("jax_enable_compilation_cache", False)
    for text in args.settings:
        kernels = count_kernels(compile_update(*parse_setting(text, args.env_id)))
        print(f"{text}: {kernels.total():,} kernels per update")
        exchanged = Counter({part: count for part, count in kernels.items() if part.startswith(BETWEEN)})
        for part, count in (*exchanged.most_common(), *(kernels - exchanged).most_common(args.rows)):
            print(f"{count:9,}  {part}")


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)))
