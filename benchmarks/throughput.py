"""Measure how fast the scripts train, also as a fraction of what the machine can do at most.

    uv run benchmarks/throughput.py
    uv run benchmarks/throughput.py --settings deep_spi "deep_spi --overlap-rollout"    # only these
    uv run benchmarks/throughput.py --world-models    # instead, Deep SPI with each of its world models
    uv run benchmarks/throughput.py --torch           # also the same network and update in PyTorch
    uv run --extra minatar benchmarks/throughput.py --env-ids Breakout-MinAtar Seaquest-MinAtar --rejax

One run measures, on the current device, the speed of a float32 matrix product and of random actions in the environments. For
each script and setting it measures steps per second, compile time, and the split between rollout and update. It also starts
scripts twice, to measure the time to the first update and the peak memory. The settings take turns in every round, so that
other load on the machine slows all of them equally. The medians over rounds are printed and written as JSON. Compare ratios
within one run, not seconds between runs.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict, dataclass, replace  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import deep_mdp_ppo as deep_mdp  # noqa: E402
import deep_spi  # noqa: E402
import dream_spi  # noqa: E402
import ppo_atari_envpool_xla_jax_scan as ppo  # noqa: E402
from envs.registry import family, make_env  # noqa: E402
from utils.dreams.replay import prefill_iterations  # noqa: E402
from utils.runs.flags import UsageError, check_flags, make_args, parse_command, parse_flags, require  # noqa: E402
from utils.runs.launch import describe_device, run_main  # noqa: E402
from utils.runs.outputs import check_output  # noqa: E402

MATRIX = 4096
UV = os.environ.get("UV", "uv")  # set by `uv run`
SCRIPTS = {"ppo": ppo, "deep_mdp": deep_mdp, "deep_spi": deep_spi, "dream_spi": dream_spi}
ON_ATARI = (  # in addition to all scripts with default flags
    "ppo --minibatch-by transition",
    "deep_spi --minibatch-by transition",
    "ppo --env-step callback",
    "ppo --overlap-rollout",
    "deep_spi --overlap-rollout",
    "ppo --compute-dtype bfloat16",
    "deep_spi --compute-dtype bfloat16",
    "dream_spi --no-use-replay-buffer",
)
WORLD_MODELS = (
    {},
    {"transition_density": "normal"},
    {"transition_density": "deterministic"},
    {"lipschitz_nets": False, "lambda_gp": 0.0},
    {"lipschitz_nets": False},
    {"lipschitz_nets": False, "use_wgan_gp": True},
    {"transition_density": "normal", "lipschitz_nets": False},
    {"transition_density": "deterministic", "lipschitz_nets": False},
    {"latent": "categorical", "world_model": "fc"},
    {"latent": "categorical", "world_model": "fc", "use_gumbel_softmax": True},
    {"latent": "categorical", "world_model": "fc", "categorical_cost": "hamming"},
    {"latent": "categorical", "world_model": "fc", "categorical_cost": "cross_entropy"},
    {"latent": "categorical", "world_model": "fc", "categorical_cost": "jensen_shannon"},
    {"latent": "categorical", "world_model": "transformer"},
    {"latent": "categorical", "world_model": "softmoe"},
)


@dataclass
class Args:
    """Measure how fast the scripts train."""

    rounds: int = 5
    """timed iterations of each setting"""
    env_ids: tuple[str, ...] = ("Breakout-v5", "Seaquest-v5")
    """games; the default ones have 4 and 18 actions"""
    num_envs: int | None = None
    """number of environments (default: the scripts' default for each game)"""
    num_steps: int | None = None
    """steps per rollout (default: the scripts' default for each game)"""
    settings: tuple[str, ...] = ()
    """time only these scripts (ppo, deep_mdp, deep_spi, dream_spi), skip --startup; quote a script to give it flags"""
    world_models: bool = False
    """instead of all scripts, time Deep SPI with each world model, on the first game only; skip --startup"""
    startup: bool = True
    """also start scripts as a user does, to measure the time to the first update and the peak memory"""
    torch: bool = False
    """also time PPO's computation on Atari in PyTorch, see benchmarks/torch_ppo.py (downloads several GB)"""
    rejax: bool = False
    """also time rejax, another public JAX PPO, on the first game (must be MinAtar's); see benchmarks/rejax_ppo.py"""
    output: str = "throughput.json"
    """path of the JSON file"""


def seconds(f, *args) -> tuple[float, object]:
    """Return the wall-clock seconds of a call, including its work on the device, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(f(*args))
    return time.perf_counter() - start, result


def flops_per_step(args) -> float:
    """Return the floating-point operations that training needs per environment step, 2 per multiply-add.

    A gradient costs twice the forward pass, except for the first convolution, whose input (pixels) needs no gradient. This is a
    lower bound for any implementation: certification, pointwise operations and sampling are excluded. It holds only for the
    default networks, without dreams.
    """
    first = 20 * 20 * 32 * 8 * 8 * 4
    convolutions = first + 9 * 9 * 64 * 4 * 4 * 32 + 7 * 7 * 64 * 3 * 3 * 64
    heads = 3136 * 512 + 512 * 19
    frames, world_model = 1.0, 0.0
    if hasattr(args, "transition_loss_coef"):
        frames = 2.0 if args.minibatch_by == "transition" else (args.num_steps + 1) / args.num_steps
        world_model = 49 * 4 * 64 * 128 + 49 * 16 * 8 * (8 + 8 + 24) + 3136 * 256 + 256 * 256
    rollout = (convolutions + heads) * (args.num_steps + 1) / args.num_steps
    update = args.update_epochs * (frames * (3 * convolutions - first) + 3 * (heads + world_model))
    return 2.0 * (rollout + update)


def parse_setting(text: str, env_id: str) -> tuple[str, dict]:
    """Return the script that a value of --settings names, and its flags that are not the defaults.

    Raises:
        UsageError: the text names no script, or sets an environment.
    """
    try:
        name, *flags = shlex.split(text) or [""]
    except ValueError as error:
        raise UsageError(f"--settings {text!r}: {str(error).lower()}") from None
    require(name in SCRIPTS, f"--settings {text!r}: must begin with one of {', '.join(SCRIPTS)}")
    args = vars(parse_flags(SCRIPTS[name].Args, [f"--env-id={env_id}", *flags]))
    require(args["env_id"] == env_id, f"--settings {text!r}: --env-ids sets the environments; leave --env-id out")
    require(args["num_devices"] == 1, f"--settings {text!r}: one device is timed; leave --num-devices out")
    usual = vars(make_args(SCRIPTS[name].Args, env_id=env_id))
    return name, {flag: value for flag, value in args.items() if flag == "env_id" or value != usual[flag]}


class Setting:
    """One script with one set of flags: the compiled program and its training state."""

    def __init__(self, name: str, **flags):
        module = SCRIPTS[name]
        self.args = make_args(module.Args, **flags)
        check_flags(self.args)
        self.env = make_env(self.args)
        self.label = f"{name} {self.args.env_id} ({self.env.num_actions} actions)"
        self.label += "".join(f" {key}={flags[key]}" for key in flags if key not in ("env_id", "num_envs", "num_steps"))
        plain = not set(flags) - {"env_id", "num_envs", "num_steps", "minibatch_by", "env_step", "overlap_rollout"}
        self.counted = plain and name != "dream_spi" and family(self.args.env_id) == "atari"
        agent = module.make_agent(self.args, self.env.num_actions, self.env.obs_parts)
        optimizer = module.make_optimizer(self.args)
        self.state = module.init_state(self.args, self.env, agent, optimizer)
        rollout = lambda state: module.rollout(state, self.env, agent, self.args)  # noqa: E731
        learn = lambda state, steps: module.learn(state, steps, self.env, agent, optimizer, self.args)  # noqa: E731
        start = time.perf_counter()
        self.rollout = jax.jit(rollout, donate_argnums=0).lower(self.state).compile()
        self.learn = jax.jit(learn, donate_argnums=0).lower(*jax.eval_shape(rollout, self.state)).compile()
        self.compile_seconds = time.perf_counter() - start
        fill = jax.jit(lambda state, steps: module.prefill(state, steps, self.env, agent, self.args), donate_argnums=0)
        for _ in range(prefill_iterations(self.args)):
            self.state, _ = fill(*self.rollout(self.state))
        self.rolling, self.learning = [], []
        self.run()
        self.rolling.clear(), self.learning.clear()

    def run(self) -> None:
        """Time one rollout and the update on it."""
        took, (state, steps) = seconds(self.rollout, self.state)
        self.rolling.append(took)
        took, (self.state, _) = seconds(self.learn, state, steps)
        self.learning.append(took)

    def report(self, matrix_rate: float, env_rates: dict[str, float]) -> dict:
        """Return a row with the medians over rounds."""
        rolling, learning = statistics.median(self.rolling), statistics.median(self.learning)
        rate = self.args.num_envs * self.args.num_steps / (rolling + learning)
        return {
            "setting": self.label,
            "steps_per_second": rate,
            "rollout_seconds": rolling,
            "update_seconds": learning,
            "compile_seconds": self.compile_seconds,
            "share_of_matrix_rate": rate * flops_per_step(self.args) / matrix_rate if self.counted else None,
            "share_of_env_rate": rate / env_rates[self.args.env_id],
        }


class Alone:
    """A game's environments, stepped without training."""

    def __init__(self, args):
        env = make_env(args)
        self.steps, self.seconds, generator = args.num_envs * args.num_steps, [], np.random.default_rng(0)
        actions = generator.integers(0, env.num_actions, (args.num_steps, args.num_envs)).astype(np.int32)
        state, _ = env.reset()
        if env.saveable:  # in JAX
            scan = jax.jit(lambda state: jax.lax.scan(env.step, state, actions))
            self.play = lambda: jax.block_until_ready(scan(state))
        else:
            self.play = lambda: [env.pool.step(action) for action in actions]  # Atari: single frames
        self.play()

    def run(self) -> None:
        """Time as many random steps as a rollout has."""
        start = time.perf_counter()
        self.play()
        self.seconds.append(time.perf_counter() - start)

    def rate(self) -> float:
        """Return the median steps per second."""
        return self.steps / statistics.median(self.seconds)


def time_peer(script: str, *given) -> list[dict]:
    """Run the benchmark of another PPO, in its own installation, and return its rows."""
    command = [UV, "run", "--script", str(ROOT / "benchmarks" / script), *map(str, given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        print(f"*** {shlex.join(command)} failed; its rows are skipped ***")
        return []
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(pid: int) -> int:
    """Return the peak resident memory of a running process, in KiB; 0 if it has ended or the system does not report it.

    Only Linux reports it. `wait4` is no alternative: it includes the memory of this process, from which the other was forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) if found else 0


def startup(command: str, env_id: str, cache: str) -> dict:
    """Start a script as a user does, and return its time to the first update and its peak memory. `cache` is a folder for
    compiled programs."""
    script, *flags = command.split()
    with tempfile.TemporaryDirectory() as folder:
        args = parse_flags(importlib.import_module(script.removesuffix(".py")).Args, [f"--env-id={env_id}", *flags])
        steps = f"--total-timesteps={(3 + prefill_iterations(args)) * args.num_envs * args.num_steps}"
        command = [sys.executable, str(ROOT / script), f"--env-id={env_id}", steps, f"--logdir={folder}", *flags]
        start = time.perf_counter()
        kept = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=kept)
        first, peak, output = None, 0, ""
        for line in process.stdout:
            output += line
            if re.match("first update", line):
                first = time.perf_counter() - start
            peak = max(peak, peak_memory(process.pid))
        status = process.wait()
        if status != 0 or first is None:
            print(f"*** {shlex.join(command)} failed and is skipped; its output: ***\n{output}")
            return {}
    return {"script": " ".join([script, *flags]), "first_update_seconds": first, "peak_memory_gib": peak / 2**20}


def main(args: Args) -> None:
    """Time all settings, print the medians, and write the JSON file."""
    require(len(args.env_ids) > 0, "--env-ids: name at least one")
    require(args.rounds >= 1, f"--rounds {args.rounds}: must be at least 1")
    args = replace(args, output=str(check_output(args.output, "--output")))
    require(
        not args.rejax or (family(args.env_ids[0]) == "minatar" and shutil.which(UV)),
        "--rejax: needs uv, and a MinAtar game as the first of --env-ids",
    )
    usual_shape = args.num_envs is None and args.num_steps is None
    require(not args.rejax or usual_shape, "--rejax: has the default shape; leave out --num-envs and --num-steps")
    require(
        not args.torch or (family(args.env_ids[0]) == "atari" and shutil.which(UV)),
        "--torch: needs uv, and an Atari game as the first of --env-ids",
    )
    require(not (args.settings and args.world_models), "--settings, --world-models: choose one of the two")
    print(describe_device())
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
    matrix = jnp.ones((MATRIX, MATRIX))
    product = jax.jit(lambda a: a @ a)
    shape = {"num_envs": args.num_envs, "num_steps": args.num_steps}
    shape = {name: value for name, value in shape.items() if value is not None}
    flags_of = {env_id: make_args(ppo.Args, env_id=env_id, **shape) for env_id in args.env_ids}
    for flags in flags_of.values():
        check_flags(flags)
    alone = {env_id: Alone(flags) for env_id, flags in flags_of.items()}
    if args.world_models:
        wanted = [("deep_spi", {"env_id": args.env_ids[0]} | flags) for flags in WORLD_MODELS]
    else:
        wanted = []
        for env_id in args.env_ids:
            usual = (*SCRIPTS, *ON_ATARI) if family(env_id) == "atari" else SCRIPTS
            wanted += [parse_setting(text, env_id) for text in args.settings or usual]
    settings = []
    for name, flags in wanted:
        settings.append(Setting(name, **shape | flags))
        print(f"compiled {settings[-1].label} in {settings[-1].compile_seconds:.1f} s", flush=True)

    matrix_seconds = []
    seconds(product, matrix)
    for _ in range(args.rounds):
        matrix_seconds.append(seconds(product, matrix)[0])
        for each in (*alone.values(), *settings):
            each.run()
    matrix_rate = 2 * MATRIX**3 / statistics.median(matrix_seconds)
    env_rates = {env_id: each.rate() for env_id, each in alone.items()}
    rows = [setting.report(matrix_rate, env_rates) for setting in settings]

    print(f"\nfloat32 matrix product: {matrix_rate / 1e9:,.0f} GFLOP/s; random actions only, steps/s: ", end="")
    print(", ".join(f"{env_id} {rate:,.0f}" for env_id, rate in env_rates.items()) + "\n")
    width = max(len(setting.label) for setting in settings)
    print(f"{'':{width}s} steps/s  of first of matrix  of its env   rollout    update  compile")
    for setting, row in zip(settings, rows, strict=True):
        base = next(r for s, r in zip(settings, rows, strict=True) if s.args.env_id == setting.args.env_id)
        row["relative_to_first"] = row["steps_per_second"] / base["steps_per_second"]
        share = f"{row['share_of_matrix_rate']:.0%}" if setting.counted else "-"
        print(
            f"{row['setting']:{width}s} {row['steps_per_second']:7,.0f} {row['relative_to_first']:7.2f} "
            f"{share:>9s} {row['share_of_env_rate']:11.0%} {row['rollout_seconds']:7.3f} s "
            f"{row['update_seconds']:7.3f} s {row['compile_seconds']:6.1f} s"
        )
    result = {
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
        "args": asdict(args),
        "matrix_flops_per_second": matrix_rate,
        "env_steps_per_second": env_rates,
        "settings": rows,
        "startup": [],
    }

    def write():
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")

    write()  # the processes started below may fail
    peers = time_peer("rejax_ppo.py", args.env_ids[0], args.rounds) if args.rejax else []
    if args.torch:
        flags = flags_of[args.env_ids[0]]
        peers += time_peer("torch_ppo.py", flags.num_envs, flags.num_steps, settings[0].env.num_actions, args.rounds)
    for row in peers:
        row["relative_to_first"] = row["steps_per_second"] / rows[0]["steps_per_second"]
        result["settings"].append(row)
        split = "".join(f"{row[name]:{n}.3f} s" for name, n in (("rollout_seconds", 30), ("update_seconds", 8)) if name in row)
        print(f"{row['setting']:{width}s} {row['steps_per_second']:7,.0f} {row['relative_to_first']:7.2f}{split}")
    if args.startup and not (args.world_models or args.settings):
        commands = ["ppo_atari_envpool_xla_jax_scan.py", "deep_spi.py", "dream_spi.py", "dream_spi.py --no-use-replay-buffer"]
        for command in commands:
            with tempfile.TemporaryDirectory() as cache:
                row, again = (startup(command, args.env_ids[0], cache) for _ in range(2))
            if not (row and again):
                continue
            row["second_start_seconds"] = again["first_update_seconds"]
            result["startup"].append(row)
            wait, again, memory = row["first_update_seconds"], row["second_start_seconds"], row["peak_memory_gib"]
            print(f"{command}: first update after {wait:.0f} s, on a second start {again:.0f} s; peak memory {memory:.1f} GiB")
    write()
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)))
