"""Trains a script on several seeds in one program: all runs of an environment advance together, by `jax.vmap`.

    uv run --extra minatar benchmarks/seeds.py --env-ids Breakout-MinAtar Asterix-MinAtar --seeds 1 2 3 4 5 --output scores.csv
    uv run --extra minatar benchmarks/seeds.py --vary learning-rate 5e-4 1e-3 --seeds 901 902 --flags="--clip-coef 0.2"

It is for environments in JAX, and for GPUs: there one run leaves most of the device idle. Each run is what the script computes
from the same flags, up to rounding. The table has a row for each run and each of `--points` stretches of it, the mean return of
the episodes that ended there, and is written after each environment: typed again, the command leaves out what is there.
"""

import csv
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import deep_mdp_ppo as deep_mdp  # noqa: E402
import deep_spi  # noqa: E402
import ppo_atari_envpool_xla_jax_scan as ppo  # noqa: E402
from envs.registry import make_env  # noqa: E402
from utils.runs.flags import UsageError, as_typed, check_flags, parse_flags, require  # noqa: E402
from utils.runs.launch import describe_device  # noqa: E402

SCRIPTS = {"ppo": ppo, "deep_mdp": deep_mdp, "deep_spi": deep_spi}
COLUMNS = ("script", "env_id", "flags", "seed", "step", "episodic_return", "episodes")


@dataclass
class Args:
    """Flags of the runs."""

    script: Literal["ppo", "deep_mdp", "deep_spi"] = "ppo"
    """what trains"""
    env_ids: tuple[str, ...] = ("Breakout-MinAtar",)
    """the environments, one program each"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of the runs"""
    flags: str = ""
    """further flags of the script, in one string"""
    vary: tuple[str, ...] = ()
    """a flag that takes numbers, and its values: all seeds run with each"""
    points: int = 20
    """stretches of a run that have a row each"""
    output: Path = Path("seeds.csv")
    """the table, which is added to"""


def train(module, args, seeds: tuple[int, ...], values: dict[str, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean return and the number of the episodes that ended in each update, [updates, runs]; the runs of all seeds with the
    first value come first."""
    env = make_env(args)
    agent, optimizer = module.make_agent(args, env.num_actions), module.make_optimizer(args)
    states = []
    for seed in seeds:
        seeded = replace(args, seed=seed)
        states.append(module.init_state(seeded, make_env(seeded), agent, optimizer))
    copies = max(map(len, values.values()), default=1)
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves * copies), *states)
    varied = {name: jnp.repeat(jnp.asarray(each), len(seeds)) for name, each in values.items()}

    def iterate(state, varied):
        state, metrics = module.train_iteration(state, env, agent, optimizer, replace(args, **varied))
        return state, (metrics["charts/episodic_return"], metrics["episodes"])

    iteration = jax.jit(jax.vmap(iterate), donate_argnums=0)
    start = time.perf_counter()
    iteration = iteration.lower(state, varied).compile()
    print(f"{args.env_id}: {copies * len(seeds)} runs, compiled in {time.perf_counter() - start:.0f} s", flush=True)
    logged, steps = [], args.num_envs * args.num_steps
    updates = args.total_timesteps // steps
    start = time.perf_counter()
    for update in range(1, updates + 1):
        state, metrics = iteration(state, varied)
        logged.append(jax.device_get(metrics))
        if update % max(1, updates // 10) == 0:
            elapsed = time.perf_counter() - start
            rate = update * steps / elapsed
            print(
                f"  {update * steps:,} steps of each, {rate * copies * len(seeds):,.0f} steps/s of all, {elapsed:.0f} s",
                flush=True,
            )
    returns, episodes = zip(*logged, strict=True)
    return np.stack(returns), np.stack(episodes)


def rows_of(returns: np.ndarray, episodes: np.ndarray, steps: int, points: int) -> list[tuple[int, float, int]]:
    """Step, mean return and number of the episodes of each stretch of one run in which an episode ended."""
    rows = []
    for stretch in np.array_split(np.arange(len(returns)), min(points, len(returns))):
        count = int(episodes[stretch].sum())
        if count:
            mean = float(np.dot(np.where(episodes[stretch] > 0, returns[stretch], 0.0), episodes[stretch]) / count)
            rows.append((int(stretch[-1] + 1) * steps, mean, count))
    return rows


def main(args: Args) -> None:
    """Trains what the table lacks, and adds it."""
    module = SCRIPTS[args.script]
    print(describe_device())
    name = args.vary[0].removeprefix("--").replace("-", "_") if args.vary else ""
    require(len(args.vary) != 1, f"--vary {' '.join(args.vary)}: needs values after the flag")
    require(not name or hasattr(module.Args, name), f"--vary {args.vary[0] if name else ''}: {args.script} has no such flag")
    values = {name: [float(value) for value in args.vary[1:]]} if name else {}
    done = set()
    if args.output.exists():
        with args.output.open() as file:
            done = {(row["script"], row["env_id"], row["flags"], row["seed"]) for row in csv.DictReader(file)}
    for env_id in args.env_ids:
        typed = [f"--env-id={env_id}", *shlex.split(args.flags)]
        flags = parse_flags(module.Args, typed)
        check_flags(flags)
        require(
            make_env(flags).saveable, f"--env-ids {env_id}: is not an environment in JAX; its emulators step one program alone"
        )
        labels = (
            [" ".join(filter(None, (args.flags, as_typed(name, value)))) for value in values[name]] if name else [args.flags]
        )
        runs = [(args.script, env_id, label, str(seed)) for label in labels for seed in args.seeds]
        if done.issuperset(runs):
            print(f"{env_id}: done before")
            continue
        returns, episodes = train(module, flags, args.seeds, values)
        new = not args.output.exists()
        with args.output.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS] * new)
            for i, run in enumerate(runs):
                for step, mean, count in rows_of(returns[:, i], episodes[:, i], flags.num_envs * flags.num_steps, args.points):
                    writer.writerow((*run, step, f"{mean:.4f}", count))
        for label in labels:
            last = [
                rows_of(returns[:, i], episodes[:, i], 1, args.points)[-1][1] for i, run in enumerate(runs) if run[2] == label
            ]
            spread = f" +- {np.std(last, ddof=1):.2f}" if len(last) > 1 else ""
            print(f"{env_id} {label}: {np.mean(last):.2f}{spread} in the last stretch", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (UsageError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
