"""Pictures of dreams: how far the world model, given the actions that were taken, stays with what really happened."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from utils.runs.flags import Count, Needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFIX = "dreams/trace/"  # of the names of arrays to be drawn, see `trace_dreams`
EXAMPLES = 4  # dreams that are drawn on their own


@dataclass
class DreamTraceArgs:
    """Flags of the pictures of dreams."""

    log_dreams: bool = False
    """log figures of dreams beside what really followed, given the same actions: rewards, ends, and the error of the latent,
    over the horizon of a dream, or the rollout if that is shorter"""
    log_dreams_every: Annotated[Count, Needs(log_dreams=True)] = 100
    """updates from one such figure to the next"""


def trace_dreams(params: Any, steps: Any, key: jax.Array, agent: Any, args: Any) -> dict[str, Float[Array, "H B"]]:
    """Dreams from the first latents of a rollout, with the actions taken in it, beside the rollout.

    H is the horizon of a dream, or the length of the rollout if that is less. `alive` is 1 while the real episode has not
    ended: nothing real is left to compare with thereafter. `error` is the distance of the dreamt next latent from the real one,
    `no_change` that of the first latent from it: Euclidean for continuous latents, for categorical ones the share of variables
    that differ.

    Args:
        params, agent: a script's networks; the parameters are best those before they learned from this rollout.
        steps: the rollout.
        key: draws next latents.
        args: the script's flags.
    """
    horizon = min(args.imagination_horizon, args.num_steps)
    first_z = agent.encoder.apply(params.encoder, steps.obs[0])
    after = jax.tree.map(lambda x: x[:horizon], steps._replace(obs=steps.obs[1:]))

    def distance(a, b):
        if args.latent == "categorical":
            return jnp.mean(1.0 - jnp.sum(a * b, axis=-1), axis=-1)
        return jnp.linalg.norm((a - b).reshape(a.shape[0], -1), axis=-1)

    def step(carry, now):
        z, alive = carry
        real, key = now
        alive = alive * real.valid
        real_z = agent.encoder.apply(params.encoder, real.obs)
        next_z = agent.transition.apply(params.transition, z, real.action).sample(key)
        return (next_z, alive), {
            "alive": alive,
            "reward": real.reward,
            "dreamt_reward": agent.reward.apply(params.reward, z, real.action),
            "end": real.terminated.astype(jnp.float32),
            "dreamt_end": nn.sigmoid(agent.end.apply(params.end, z, real.action)),
            "error": distance(next_z, real_z),
            "no_change": distance(first_z, real_z),
        }

    start = first_z, jnp.ones(first_z.shape[0])
    _, traces = jax.lax.scan(step, start, (after, jax.random.split(key, horizon)))
    return {PREFIX + name: x for name, x in traces.items()}


def draw(traces: dict[str, Float[np.ndarray, "H B"]]) -> dict[str, "Figure"]:
    """Figures of what `trace_dreams` returned, by name: rewards and ends, on average and in the dreams in which most happened;
    the error of the latent over the horizon."""
    from matplotlib.figure import Figure  # here, because it takes a second to import and most runs do without

    traces = {name.removeprefix(PREFIX): x for name, x in traces.items()}
    alive = traces["alive"] > 0
    x = np.arange(1, len(alive) + 1)
    count = np.maximum(alive.sum(axis=1), 1)
    happened = np.where(alive, np.abs(traces["reward"]) + traces["end"], 0.0).sum(axis=0)
    examples = np.argsort(-happened, kind="stable")[:EXAMPLES]

    outcomes = Figure(figsize=(3 * (1 + len(examples)), 5), layout="constrained")
    grid = outcomes.subplots(2, 1 + len(examples), sharex=True, sharey="row", squeeze=False)
    for row, (name, title) in zip(grid, (("reward", "reward"), ("end", "probability of an end")), strict=True):
        for column, axes in enumerate(row):
            for source, style in ((name, "o-"), (f"dreamt_{name}", "x--")):
                values = np.where(alive, traces[source], 0.0)
                if column == 0:
                    y = np.where(alive.any(axis=1), values.sum(axis=1) / count, np.nan)
                else:
                    y = np.where(alive[:, examples[column - 1]], values[:, examples[column - 1]], np.nan)
                axes.plot(x, y, style, label="real" if source == name else "dreamt")
            axes.set_title(f"{title}, {'mean' if column == 0 else f'environment {examples[column - 1]}'}", fontsize=9)
    grid[0, 0].legend()
    for axes in grid[1]:
        axes.set_xlabel("step of the dream")

    errors = Figure(figsize=(5, 4), layout="constrained")
    axes = errors.subplots()
    for name, label in (("error", "dreamt"), ("no_change", "first latent, unchanged")):
        of = [traces[name][t, alive[t]] if alive[t].any() else np.full(1, np.nan) for t in range(len(x))]
        (line,) = axes.plot(x, [np.mean(v) for v in of], "o-", label=label)
        low, high = ([np.quantile(v, q) for v in of] for q in (0.1, 0.9))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="step of the dream", ylabel="distance from the real latent", ylim=(0, None))
    axes.legend()
    return {"dreams/outcomes": outcomes, "dreams/latent_error": errors}
