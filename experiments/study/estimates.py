"""Estimate the time and the disk space that a study needs."""

import dataclasses
import importlib
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from envs.registry import UNDIVIDED, family, make_env
from experiments.study.plan import PlannedRun, Progress, rates, seconds_left, state_of
from utils.runs.flags import parse_flags
from utils.runs.folder import ROOT

MEASURED = ("docs/throughput.json", "docs/throughput_minatar.json")
LOG_BYTES = 1_700  # per update, metrics.jsonl and TensorBoard file: 206 KiB for 122 updates of Deep SPI on Breakout-MinAtar


def _published(runs: list[PlannedRun]) -> tuple[dict[tuple[str, str], float], str]:
    """Return the steps per second in the project's benchmarks, for the same environment or its family, and their source."""
    rate, machines = {}, []
    for name in MEASURED:
        measured = json.loads((ROOT / name).read_text())
        machines.append(f"{name} on {measured['cpus']} CPU cores")
        for setting in measured["settings"]:
            script, env_id, *more = setting["setting"].split()
            if len(more) == 2:  # "(4 actions)" only: default flags
                rate.setdefault((script, env_id), setting["steps_per_second"])
    found = {}
    for run in runs:
        script = Path(run.command[1]).stem
        own = {"deep_mdp_ppo": "deep_mdp", "ppo_atari_envpool_xla_jax_scan": "ppo"}.get(script, script)
        near = [v for (s, e), v in rate.items() if s == own and (e == run.env_id or family(e) == family(run.env_id))]
        if near:
            found[run.script, run.env_id] = rate.get((own, run.env_id), near[0])
    return found, " and ".join(machines)


def disk_bytes(run: PlannedRun) -> int | None:
    """Estimate the size of a finished run's folder: checkpoints (without environments), model and logs.
    Return None if the script lacks the functions of the other scripts."""
    jax.config.update("jax_platforms", "cpu")  # only shapes are needed; do not reserve GPU memory
    script = importlib.import_module(Path(run.command[1]).stem)
    if not all(hasattr(script, name) for name in ("make_agent", "make_optimizer", "init_state")):
        return None
    args = parse_flags(script.Args, run.command[2:])
    env = make_env(dataclasses.replace(args, num_envs=1, **UNDIVIDED))  # creating 128 emulators is slow, and they are not saved
    agent = script.make_agent(args, env.num_actions, env.obs_parts)
    state = jax.eval_shape(partial(script.init_state, args, env, agent, script.make_optimizer(args)))
    state = state._replace(env_state=None, obs=None)
    if hasattr(state, "replay") and not args.save_replay:
        state = state._replace(replay=None)
    size = lambda tree: sum(int(np.prod(x.shape)) * getattr(x.dtype, "itemsize", 4) for x in jax.tree.leaves(tree))  # noqa: E731
    updates = run.steps // (args.num_envs * args.num_steps)
    return size(state) * args.keep_checkpoints + size(state.params) * args.save_model + updates * LOG_BYTES


def kind_of(run: PlannedRun) -> tuple[str, str]:
    """Return the script and family of a run. Environments of your own are no family."""
    kind = family(run.env_id)
    return run.script, run.env_id if kind == "own" else kind


def describe(logdir: Path, runs: list[PlannedRun], together: int) -> list[str]:
    """Return the estimates and their source, as lines."""
    states: dict[str, Progress] = {run.name: state_of(logdir, run) for run in runs}
    finished = sum(state.kind == "finished" for state in states.values())
    sizes = {}  # one environment represents its family, whose networks are alike
    for run in runs:
        key = kind_of(run)
        if key not in sizes:
            sizes[key] = disk_bytes(run)
    known = None not in sizes.values()
    total = sum(sizes[kind_of(run)] for run in runs) if known else 0
    published, where = _published(runs)
    own = rates(runs, states)
    seconds = seconds_left(runs, states, published | own)
    source = "the runs so far" if own else f"the speeds in {where}"
    time = "unknown" if seconds is None else f"about {seconds / 3600:,.1f} hours one at a time (from {source})"
    if seconds is not None and together > 1:
        time += f", {seconds / 3600 / min(together, len(runs)):,.1f} with {together} at a time if they do not slow each other"
    return [
        f"{len(runs)} runs, {finished} finished; {sum(run.steps for run in runs):,} steps in total",
        f"time left: {time}",
        f"disk: about {tqdm.format_sizeof(total, 'B', 1024)}" if known else "disk: unknown",
    ]
