"""Check Deep SPI's guarantee (docs/guarantees.md) on the confounding gridworld, with and without --enforce-neighborhood: exact
returns, and the true improvement of every update next to the improvement that the bound promises.

    uv run experiments/guarantees.py --output docs/guarantees_gridworld

The script trains with the hyperparameters of `experiments/confounding_gridworld.py` and writes a figure (.png) and its data
(.json). All terms are exact, because environment and latent model are small tables (2 variables of 4 classes have 16 values).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__main__":
    from utils.runs.quiet_start import start_quietly

    start_quietly()

import json  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import deep_spi  # noqa: E402
from experiments import confounding_gridworld as gridworld  # noqa: E402
from experiments.study.figures import styled  # noqa: E402
from utils.files import write_whole  # noqa: E402
from utils.guarantees.bounds import episodic_bound, is_vacuous, local_error, stepwise_bound, value_span  # noqa: E402
from utils.guarantees.tabular import (  # noqa: E402
    Tables,
    difference_terms,
    episode_length,
    errors_over_time,
    fitted_model,
    mean_error,
    of_environment,
    total_variation,
    visits,
)
from utils.runs.flags import check_flags, parse_command, require  # noqa: E402
from utils.runs.launch import describe_device, run_main  # noqa: E402
from utils.runs.outputs import check_output  # noqa: E402

MODES = ("none", "early_stop", "backtrack")
VALUE = "charts/init_value"


@dataclass
class Args:
    """Check Deep SPI's improvement guarantee on the confounding gridworld."""

    output: str = "guarantees_gridworld"
    """path of the figure (.png) and its data (.json), without an extension"""
    seeds: tuple[int, ...] = tuple(range(101, 106))
    """seeds of each enforcement mode; the bound is computed for all of them and drawn for the first"""
    total_timesteps: int = 204_800
    """environment steps of each run"""


def words(flags: Any) -> np.ndarray:
    """Return all values (codes) of the categorical latent, one-hot, [Z, V, C]."""
    indices = np.indices((flags.num_classes,) * flags.num_categories).reshape(flags.num_categories, -1).T
    return np.eye(flags.num_classes, dtype=np.float32)[indices]


def as_tables(params: Any, agent: Any, cells: int, codes: np.ndarray, num_actions: int) -> dict[str, jax.Array]:
    """Return the code of each cell [S], and for each code the policy [Z, A], next codes [Z, A, Z] and rewards [Z, A]."""
    z = agent.encoder.apply(params.encoder, jnp.arange(cells))
    code = jnp.argmax(jnp.einsum("svc,zvc->sz", z, codes), axis=1)
    everywhere = jnp.repeat(jnp.asarray(codes), num_actions, axis=0)
    action = jnp.tile(jnp.arange(num_actions), len(codes))
    log_prob = jax.nn.log_softmax(agent.transition.apply(params.transition, everywhere, action).logits)
    following = jnp.exp(jnp.einsum("nvc,zvc->nz", log_prob, codes, precision="highest"))
    return {
        "phi": code,
        "policy": jax.nn.softmax(agent.actor_critic.apply(params.actor_critic, jnp.asarray(codes))[0]),
        "probability": following.reshape(len(codes), num_actions, -1),
        "reward": agent.reward.apply(params.reward, everywhere, action).reshape(len(codes), num_actions),
    }


def mode_args(mode: str, args: Args) -> Any:
    """Return the flags of Deep SPI's script for an enforcement mode."""
    setting = gridworld.Args(seeds=args.seeds, total_timesteps=args.total_timesteps)
    return replace(gridworld.script_args("Deep SPI", setting), enforce_neighborhood=mode)


def train(mode: str, args: Args) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any, Any]:
    """Train with every seed. Return metrics [seeds, K], tables [seeds, K + 1, ...], the flags and the environment."""
    flags = mode_args(mode, args)
    check_flags(flags)
    env, frames = gridworld.make_cells(flags)
    agent, optimizer = deep_spi.make_agent(flags, env.num_actions, env.obs_parts), deep_spi.make_optimizer(flags)
    agent = agent._replace(encoder=gridworld.OncePerCell(agent.encoder, frames))
    tables_of = partial(as_tables, agent=agent, cells=len(frames), codes=words(flags), num_actions=env.num_actions)

    @jax.jit
    def run(state):
        def iteration(state, _):
            state, metrics = deep_spi.learn(*deep_spi.rollout(state, env, agent, flags), env, agent, optimizer, flags)
            return state, ({VALUE: metrics[VALUE]}, tables_of(state.params))

        iterations = flags.total_timesteps // (flags.num_envs * flags.num_steps)
        _, (metrics, tables) = jax.lax.scan(iteration, state, None, length=iterations)
        return metrics, jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), tables_of(state.params), tables)

    runs = []
    for seed in args.seeds:
        seeded = replace(flags, seed=seed)
        runs.append(jax.device_get(run(deep_spi.init_state(seeded, gridworld.make_cells(seeded)[0], agent, optimizer))))
    metrics, tables = jax.tree.map(lambda *xs: np.stack(xs), *runs)
    return metrics, tables, flags, env


def with_end(tables: dict[str, np.ndarray], real: Tables, alive: np.ndarray, often: np.ndarray, low: float, high: float):
    """Return the latent of each state, the latent model as tables, and its policy, all with an end state added.

    Deep SPI's model does not predict termination. Here it gets the exact fraction of visits that end, for each code and action.
    """
    codes = len(tables["policy"])
    phi = np.append(tables["phi"][alive], codes)
    ends = fitted_model(real, phi, codes + 1, often).probability[:-1, :, -1]
    probability = np.zeros((codes + 1, real.reward.shape[1], codes + 1))
    following = tables["probability"].astype(np.float64)
    probability[:-1, :, :-1] = (1 - ends)[..., None] * following / following.sum(-1, keepdims=True)
    probability[:-1, :, -1] = ends
    probability[-1, :, -1] = 1.0
    reward = np.vstack([np.clip(tables["reward"], low, high), np.zeros(real.reward.shape[1])])
    policy = np.vstack([tables["policy"], np.full(real.reward.shape[1], 1 / real.reward.shape[1])]).astype(np.float64)
    return phi, Tables(probability, reward, np.zeros(codes + 1)), policy / policy.sum(-1, keepdims=True)


def promises(tables: dict[str, np.ndarray], env: Any, gamma: float) -> dict[str, np.ndarray]:
    """Return the improvement of each update of a run in the environment and in the latent model, and the terms of the bound."""
    model = env.model
    real = of_environment(model.probability, model.reward, model.terminal, model.start)
    alive, span = np.flatnonzero(~model.terminal), value_span(env.reward_range, gamma)
    rows = []
    for k in range(1, len(tables["phi"])):
        old, new = ({name: table[i] for name, table in tables.items()} for i in (k - 1, k))
        behavior = np.vstack([old["policy"][old["phi"][alive]], np.full(4, 0.25)]).astype(np.float64)
        behavior /= behavior.sum(-1, keepdims=True)
        often, length = visits(real, behavior), episode_length(real, behavior)
        row = {"step-wise zeta": 0.0, "episodic zeta": 0.0, "violated": 0.0}
        for which, of in (("old", old), ("new", new)):
            phi, latent, policy = with_end(of, real, alive, often, *env.reward_range)
            terms = difference_terms(real, latent, phi, policy, behavior, gamma, total_variation)
            errors, distance = jnp.asarray(terms.reward_error), jnp.asarray(terms.distance)
            error = np.asarray(local_error(errors, distance, terms.k_value, gamma, terms.span), np.float64)
            weighted = jnp.asarray(errors_over_time(real, behavior, terms.ratio * error))
            stepwise = float(stepwise_bound(weighted, terms.ratio_max, gamma, span))
            row["step-wise zeta"] += stepwise
            row["episodic zeta"] += float(episodic_bound(mean_error(real, behavior, error), terms.ratio_max, gamma, length))
            row["violated"] += not abs(terms.real - terms.latent) <= stepwise * (1 + 1e-4) + 1e-4  # also if one is NaN
            row |= {f"{which}, real": terms.real, f"{which}, latent": terms.latent}
        row |= {
            "improvement": row["new, real"] - row["old, real"],
            "latent improvement": row["new, latent"] - row["old, latent"],
            "reward error": mean_error(real, behavior, terms.reward_error),
            "transition error": mean_error(real, behavior, terms.distance),
            "ratio_max": terms.ratio_max,
            "ratio_min": terms.ratio.min(),
            "k_value": terms.k_value,
            "episode length": length,
        }
        rows.append(row)
    result = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    result["promised"] = result["latent improvement"] - result["step-wise zeta"]
    return result


@styled()
def draw(curves: dict[str, Any], bounds: dict[str, Any], args: Args) -> None:
    """Draw the exact values of all runs on top, and below the true and promised improvements of the first seed's updates."""
    figure = Figure(figsize=(7, 10))
    above, *beneath = figure.subplots(1 + len(MODES), 1, sharex=True)
    for mode, metrics in curves.items():
        values = metrics[VALUE]
        steps = np.linspace(0, args.total_timesteps, values.shape[1] + 1)[1:]
        (line,) = above.plot(steps, values.mean(axis=0), label=mode)
        above.plot(steps, values.T, color=line.get_color(), alpha=0.3, linewidth=0.6)
    above.set(ylabel="exact value of the start state")
    above.legend(title="--enforce-neighborhood")
    for axes, mode in zip(beneath, MODES, strict=True):
        of = bounds[mode][0]
        axes.plot(steps, of["improvement"], ".", markersize=3, label="true improvement")
        axes.plot(steps, of["latent improvement"], ".", markersize=2, label="improvement in the latent model")
        axes.plot(steps, of["promised"], linewidth=0.8, label="promised: latent improvement minus zeta")
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.set(ylabel=mode)
    beneath[0].legend(fontsize="small")
    beneath[-1].set(xlabel="environment steps")
    figure.savefig(f"{args.output}.png", dpi=110, metadata={"Software": None})


def main(args: Args) -> None:
    """Train with every mode, compute the bounds, and write the figure and the data."""
    require(len(set(args.seeds)) == len(args.seeds) > 0 and min(args.seeds) >= 0, "--seeds: name distinct, nonnegative seeds")
    check_flags(replace(mode_args(MODES[0], args), seed=max(args.seeds)))
    paths = [check_output(f"{args.output}{ending}", "--output", make_parent=True) for ending in (".png", ".json")]
    args = replace(args, output=str(paths[0].with_suffix("")))
    print(describe_device())
    curves, bounds, summary = {}, {}, {}
    for mode in MODES:
        started = time.perf_counter()
        curves[mode], tables, flags, env = train(mode, args)
        seconds = (time.perf_counter() - started) / len(args.seeds)
        each = [{name: table[i] for name, table in tables.items()} for i in range(len(args.seeds))]
        bounds[mode] = [promises(of, env, flags.gamma) for of in each]
        of = {name: np.concatenate([b[name] for b in bounds[mode]]) for name in bounds[mode][0]}
        below, above = 1 - flags.clip_coef - 1e-5, 1 + flags.clip_coef + 1e-5
        span, final = value_span(env.reward_range, flags.gamma), curves[mode][VALUE][:, -1]
        summary[mode] = {
            "final values": [round(float(v), 3) for v in final],
            "updates": len(of["improvement"]),
            "bound violated": int(of["violated"].sum()),
            "vacuous": float(np.mean(np.asarray(is_vacuous(of["step-wise zeta"], span)))),
            "episodic form finite": float(np.mean(np.isfinite(of["episodic zeta"]))),
            "true improvement below 0": float(np.mean(of["improvement"] < -1e-6)),
            "worst true improvement": float(np.min(of["improvement"])),
            "promised above 0": int(np.sum(of["promised"] > 0)),
            "outside the neighborhood": float(np.mean((of["ratio_max"] > above) | (of["ratio_min"] < below))),
            "medians": {name: float(np.median(of[name])) for name in of if name != "violated"},
        }
        line = {k: v for k, v in summary[mode].items() if k != "medians"}
        print(f"{mode}: {line}\n  medians {summary[mode]['medians']}; {seconds:.0f} s per seed", flush=True)
        device = describe_device().splitlines()[0].removeprefix("device: ")
        curve = {mode: [[round(float(v), 3) for v in run] for run in m[VALUE]] for mode, m in curves.items()}
        lines = [f'"{mode}": {json.dumps(of)},\n"{mode}, values": {json.dumps(curve[mode])}' for mode, of in summary.items()]
        text = f'{{"device": {json.dumps(device)}, "seeds": {json.dumps(args.seeds)},\n' + ",\n".join(lines) + "\n}\n"
        write_whole(paths[1], text.encode())
    draw(curves, bounds, args)
    print(f"written: {args.output}.png, {args.output}.json")


if __name__ == "__main__":
    run_main(lambda: main(parse_command(Args)), out_of_memory="out of memory: name fewer --seeds at a time")
