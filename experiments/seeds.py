"""Train a script on several seeds in one program: `jax.vmap` advances all runs of an environment together.

    uv run --extra minatar experiments/seeds.py --env-ids Breakout-MinAtar Asterix-MinAtar --seeds 1 2 3 4 5 --output scores.csv
    uv run --extra minatar experiments/seeds.py --vary learning-rate 5e-4 1e-3 --seeds 901 902 --flags="--clip-coef 0.2"

Use it for environments written in JAX, on a GPU, where a single run leaves most of the device idle. Each run equals that of the
script with the same flags, up to rounding. The table has one row for each of the `--points` bins of a run: the mean return of
the episodes that ended in it. A run that diverges (a loss or a parameter is NaN or infinite) ends there, as in the script, and
is left out of means. The table is written after each environment; repeating the command trains only runs not in the table.
Several processes may add to one table.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import shlex  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any, Literal, NamedTuple  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jaxtyping import Bool, Float, Int  # noqa: E402

import deep_mdp_ppo  # noqa: E402
import deep_spi  # noqa: E402
import dream_spi  # noqa: E402
import ppo_atari_envpool_xla_jax_scan as ppo  # noqa: E402
from envs.own import short  # noqa: E402
from envs.registry import is_pooled, make_env  # noqa: E402
from experiments.study.plan import named  # noqa: E402
from experiments.study.records import COLUMNS, RunRecord, check_table, stretches, typed_flags  # noqa: E402
from utils.dreams.replay import prefill_iterations  # noqa: E402
from utils.files import locked, write_csv  # noqa: E402
from utils.runs.flags import UsageError, check_flags, parse_command, parse_flags, refuse_unread, require  # noqa: E402
from utils.runs.launch import describe_device, run_main  # noqa: E402
from utils.runs.logs import STOPPING  # noqa: E402
from utils.runs.outputs import check_output  # noqa: E402
from utils.runs.run import finite_parts  # noqa: E402
from utils.runs.stored_flags import may_change, to_store  # noqa: E402

SCRIPTS = {"ppo": ppo, "deep_mdp_ppo": deep_mdp_ppo, "deep_spi": deep_spi, "dream_spi": dream_spi}
# flags that an update reads only as numbers, so they may differ between the runs of one program
VARIABLE = ("learning_rate", "gae_lambda", "clip_coef", "ent_coef", "vf_coef", "transition_loss_coef", "reward_loss_coef")
VARIABLE += ("heads_learning_rate", "real_value_coef")


@dataclass
class Args:
    """Train a script on several seeds in one program."""

    script: Literal["ppo", "deep_mdp_ppo", "deep_spi", "dream_spi"] = "ppo"
    """training script"""
    env_ids: tuple[str, ...] = ("Breakout-MinAtar",)
    """environments, with one program for each"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of the runs"""
    flags: str = ""
    """more flags of the script, in one string"""
    vary: tuple[str, ...] = ()
    """numeric flag and its values; every seed is run with each value"""
    points: int = 20
    """number of bins of steps in a run; each bin is a row of the table"""
    output: Path = Path("seeds.csv")
    """path of the table (.csv), to which new runs are added"""


class Returns(NamedTuple):
    """What is logged of all runs. `finite` is False from the update on in which a run diverged."""

    mean: Float[np.ndarray, "K R"]  # of the episodes that ended in each of K updates of R runs; NaN if none did
    episodes: Int[np.ndarray, "K R"]  # number of these episodes
    finite: Bool[np.ndarray, "K R"]


def train(module: Any, args: Any, runs: list[dict]) -> Returns:
    """Train all runs.

    Args:
        module: the script.
        args: its flags.
        runs: each run's seed, and its values of the varied flags (of `VARIABLE`); all runs vary the same flags.
    """
    env = make_env(args)
    agent = module.make_agent(args, env.num_actions, env.obs_parts)
    states = []
    for run in runs:
        seeded = replace(args, seed=run["seed"])
        states.append(module.init_state(seeded, make_env(seeded), agent, module.make_optimizer(args)))
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    varied = {name: jnp.array([run[name] for run in runs]) for name in runs[0] if name != "seed"}

    def iterate(state, varied, fills):
        flags = replace(args, **varied)
        rolled = module.rollout(state, env, agent, flags)
        if fills:  # the replay buffer, before the first update
            state, metrics = module.prefill(*rolled, env, agent, flags)
        else:
            state, metrics = module.learn(*rolled, env, agent, module.make_optimizer(flags), flags)
        losses = [value for name, value in metrics.items() if name.startswith(STOPPING)]
        _, results = finite_parts(state.params, state.opt_state)  # what stops a run of the script
        finite = jnp.all(results) & jnp.all(jnp.array([jnp.all(jnp.isfinite(loss)) for loss in losses]))
        return state, (metrics["charts/episodic_return"], metrics["charts/episodes"], finite)

    start, prefill, compiled = time.perf_counter(), prefill_iterations(args), {}
    for fills in (True, False) if prefill else (False,):
        step = jax.jit(jax.vmap(partial(iterate, fills=fills)), donate_argnums=0)
        compiled[fills] = step.lower(state, varied).compile()
    print(f"{args.env_id}: {len(runs)} runs, compiled in {time.perf_counter() - start:.0f} s", flush=True)
    logged, steps = [], args.num_envs * args.num_steps
    updates = args.total_timesteps // steps
    start = time.perf_counter()
    for update in range(1, updates + 1):
        state, metrics = compiled[update <= prefill](state, varied)
        logged.append(jax.device_get(metrics))
        if update % max(1, updates // 10) == 0:
            elapsed = time.perf_counter() - start
            rate = update * steps * len(runs) / elapsed
            print(f"  {update * steps:,} steps per run, {rate:,.0f} steps/s in total, {elapsed:.0f} s", flush=True)
    mean, episodes, finite = map(np.stack, zip(*logged, strict=True))
    return Returns(mean, episodes.astype(int), np.logical_and.accumulate(finite))


def rows_of(
    returns: Float[np.ndarray, " K"], episodes: Int[np.ndarray, " K"], finite: Bool[np.ndarray, " K"], steps: int, points: int
) -> list[tuple[int, float | None, int]]:
    """Return, for each bin of a run, its last step, its mean return (None without episodes) and its number of episodes. A run
    that diverged has rows up to its last finite update, or one of step 0."""
    last = int(finite.sum())
    if last == 0:
        return [(0, None, 0)]
    step, weight = steps * np.arange(1, last + 1), np.asarray(episodes[:last], float)
    run = RunRecord("", "", "", "", 0, steps * len(returns), step, np.asarray(returns[:last], float), weight)
    run = stretches(run, min(points, len(returns)))
    columns = zip(run.step, run.value, run.weight, strict=True)
    return [(int(step), float(value) if count else None, int(count)) for step, value, count in columns]


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of the table; none if the file does not exist.

    Raises:
        UsageError: the file is another type of table, or a row is damaged.
    """
    rows = check_table(path, COLUMNS, "--output")
    for number, row in enumerate(rows, 2):
        try:
            float(row["episodic_return"] or 0), int(row["step"]), int(row["planned_steps"])
            whole = set(row) == set(COLUMNS) and None not in row.values()
        except (ValueError, TypeError):
            whole = False
        require(whole, f"--output {path}: line {number} is damaged; delete the rows of its run, which is then trained again")
    return rows


def add_to_table(path: Path, rows: list[dict]) -> None:
    """Add the rows of runs that are not in the table; on an error, the old file stays as it is."""
    with locked(path):
        old = read_table(path)
        known = {columns_of(row) for row in old}
        new = [row for row in rows if columns_of(row) not in known]  # another process may have trained the same runs
        write_csv(path, COLUMNS, ([row[name] for name in COLUMNS] for row in (*old, *new)))


def plan(args: Args) -> dict[str, tuple[Any, list[dict]]]:
    """Return for each environment the script's flags, and the flags that differ between its runs.

    Raises:
        UsageError: a flag is wrong.
    """
    module = SCRIPTS[args.script]
    require(args.points > 0, f"--points {args.points}: must be at least 1")
    require(len(args.seeds) > 0, "--seeds: name at least one")
    require(len(set(args.seeds)) == len(args.seeds), f"--seeds {' '.join(map(str, args.seeds))}: has duplicates; remove them")
    require(len(args.env_ids) > 0, "--env-ids: name at least one")
    try:
        typed = shlex.split(args.flags)
    except ValueError as error:
        raise UsageError(f"--flags {args.flags!r}: {str(error).lower()}") from None
    for flag in ("env-id", "seed"):
        require(flag not in named(typed), f"--flags: --{flag} is not allowed; use --{flag}s instead")
    values = [{}]
    if args.vary:
        name, *words = args.vary
        name = name.removeprefix("--").replace("-", "_")
        known = [flag for flag in VARIABLE if hasattr(module.Args, flag)]
        require(name in known, f"--vary {args.vary[0]}: must be one of {', '.join(known)}")
        try:
            values = [{name: float(word)} for word in words]
        except ValueError:
            raise UsageError(f"--vary {' '.join(args.vary)}: the values must be numbers") from None
        require(len(values) > 0, f"--vary {args.vary[0]}: has no values; add them after the flag")
        require(len({*map(float, words)}) == len(words), f"--vary {' '.join(args.vary)}: has duplicates; remove them")
    planned = {}
    for env_id in args.env_ids:
        flags = parse_flags(module.Args, [f"--env-id={env_id}", *typed])
        wandb = (name for name in vars(flags) if name.startswith("wandb_"))
        unread = {*may_change(module.Args), *wandb}  # nothing but returns is logged, and no run has a folder
        refuse_unread(flags, tuple(sorted(unread)), "the script itself, which logs and saves")
        for value in values:
            for seed in args.seeds:
                check_flags(replace(flags, seed=seed, **value))
        in_jax = not is_pooled(env_id) and make_env(replace(flags, num_envs=1)).saveable
        require(in_jax, f"--env-ids {env_id}: is not written in JAX; start the script once for each seed instead")
        planned[env_id] = flags, [{"seed": seed} | value for value in values for seed in args.seeds]
    return planned


def identity(script: str, flags: Any, run: dict) -> tuple[str, ...]:
    """Return the first columns of a run's rows, which identify it as a report does: flags with default values are left out."""
    stored = to_store(replace(flags, **run))
    return script, short(flags.env_id), typed_flags(SCRIPTS[script].__name__, stored), str(run["seed"])


def columns_of(row: dict[str, str]) -> tuple[str, ...]:
    """Return the columns of a row that identify its run."""
    return tuple(row[name] for name in COLUMNS[:4])


def summary(rows: list[dict], runs: list[tuple[str, ...]]) -> str:
    """Return mean and standard deviation over runs of the return in the last bin in which an episode ended, and the seeds of
    the runs that diverged, which do not count."""
    of = {run: [row for row in rows if columns_of(row) == run] for run in runs}
    diverged = {run: int(own[-1]["step"]) for run, own in of.items() if int(own[-1]["step"]) < int(own[-1]["planned_steps"])}
    returns = {run: [float(row["episodic_return"]) for row in own if row["episodic_return"]] for run, own in of.items()}
    last = [found[-1] for run, found in returns.items() if run not in diverged and found]
    spread = f" +- {np.std(last, ddof=1):.2f}" if len(last) > 1 else ""
    said = [f"{np.mean(last):.2f}{spread} ({len(last)} seeds)"] if last else []
    silent = len(runs) - len(diverged) - len(last)
    said += [f"no episode has ended in {silent} runs"] if silent else []
    said += [f"seed {run[3]} diverged after step {step:,}" for run, step in diverged.items()]
    return "; ".join(said)


def main(args: Args) -> None:
    """Train the runs that are not in the table, and add them."""
    module, planned = SCRIPTS[args.script], plan(args)
    args = replace(args, output=check_output(args.output, "--output"))
    rows = read_table(args.output)
    print(describe_device())
    for env_id, (flags, runs) in planned.items():
        done = {columns_of(row) for row in rows}
        missing = [run for run in runs if identity(args.script, flags, run) not in done]
        if missing:
            returns, batch = train(module, flags, missing), flags.num_envs * flags.num_steps
            for i, run in enumerate(missing):
                first = dict(zip(COLUMNS, identity(args.script, flags, run), strict=False))
                first["planned_steps"] = len(returns.mean) * batch
                for step, mean, count in rows_of(*(column[:, i] for column in returns), batch, args.points):
                    mean = "" if mean is None else f"{mean:.4f}"
                    rows.append(first | {"step": step, "episodic_return": mean, "episodes": count})
        print(f"{env_id}: {len(runs) - len(missing)} runs already in the table, {len(missing)} added; final mean return:")
        asked = [identity(args.script, flags, run) for run in runs]
        for said in dict.fromkeys(said for _, _, said, _ in asked):
            print(f"  {said or 'defaults'}: {summary(rows, [run for run in asked if run[2] == said])}", flush=True)
        if missing:  # after the scores, which are then known even if the disk is full
            add_to_table(args.output, rows)


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)), out_of_memory="out of memory: name fewer --seeds or values of --vary at a time")
