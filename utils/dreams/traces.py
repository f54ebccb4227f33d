"""A picture of dreams: how far the world model, given the actions that were taken, stays with what really happened."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from envs.frames import SMALLEST_FRAME
from envs.minatar import in_colors
from utils.runs.flags import Count, Needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREFIX = "dreams/trace/"  # of the names of arrays to be drawn, see `trace_dreams`
PICTURE = "dreams/dream"  # the name of what is drawn
COLUMNS = 9  # frames of a dream that are drawn, at most
LIKELY = 0.05  # probabilities of an end below this are not written beside a frame


@dataclass
class DreamTraceArgs:
    """Flags of the picture of dreams."""

    log_dreams: bool = False
    """log a picture of dreams beside what really followed, given the same actions: one dream frame by frame, and of all of them
    rewards, ends, and the error of the latent, over the horizon of a dream, or the rollout if that is shorter"""
    log_dreams_every: Annotated[Count, Needs(log_dreams=True)] = 100
    """updates from one such picture to the next"""


def trace_dreams(params: Any, steps: Any, key: jax.Array, agent: Any, args: Any, dream_step: Callable) -> dict[str, Array]:
    """Dreams from the first latents of a rollout, with the actions taken in it, beside the rollout.

    H is the horizon of a dream, or the length of the rollout if that is less. `alive` [H, B] is 1 while the real episode has
    not ended: nothing real is left to compare with thereafter. `error` is the distance of the dreamed next latent from the real
    one, `no_change` that of the first latent from it: Euclidean for continuous latents, for categorical ones the share of
    variables that differ. One dream, that in which most rewards and ends happened, is there step by step: the number of its
    environment `example`, the actions `taken` [H] in it, its observations `frames` [H+1, *obs], and `like` [H+1, *obs], for
    each of its latents the observation of the whole rollout whose latent is nearest: what it dreams of.

    Args:
        params, agent: a script's networks; the parameters are best those before they learned from this rollout.
        steps: the rollout.
        key: draws next latents.
        args: the script's flags.
        dream_step: the script's step in the world model.
    """
    horizon = min(args.imagination_horizon, args.num_steps)
    encode = lambda t: agent.encoder.apply(params.encoder, steps.obs[t])  # noqa: E731
    real_z = jax.lax.map(encode, jnp.arange(len(steps.obs)))  # [T+1, B, *z]
    after = jax.tree.map(lambda x: x[:horizon], steps._replace(obs=real_z[1:], value=None))

    def distance(a, b):
        if args.latent == "categorical":
            return jnp.mean(1.0 - jnp.sum(a * b, axis=-1), axis=-1)
        return jnp.linalg.norm((a - b).reshape(a.shape[0], -1), axis=-1)

    def step(carry, now):
        z, alive = carry
        real, key = now
        alive = alive * real.valid
        next_z, reward, ends = dream_step(params, z, real.action, key, agent, args)
        return (next_z, alive), (
            {
                "alive": alive,
                "reward": real.reward,
                "dreamed_reward": reward,
                "end": real.terminated.astype(jnp.float32),
                "dreamed_end": ends,
                "error": distance(next_z, real.obs),
                "no_change": distance(real_z[0], real.obs),
            },
            next_z,
        )

    start = real_z[0], jnp.ones(real_z.shape[1])
    _, (traces, dreamed_z) = jax.lax.scan(step, start, (after, jax.random.split(key, horizon)))
    happened = jnp.abs(traces["reward"]) + traces["end"] + 0.1  # and rather long than short
    example = jnp.argmax(jnp.sum(traces["alive"] * happened, axis=0))
    of_example = jnp.concatenate([real_z[:1, example], dreamed_z[:, example]]).reshape(horizon + 1, -1)
    flat = real_z.reshape(-1, of_example.shape[1])
    # |a - b|^2 but for |a|^2
    distances = jnp.sum(flat**2, axis=1) - 2.0 * jnp.matmul(of_example, flat.T, precision="highest")
    own = jnp.arange(horizon + 1) * real_z.shape[1] + example  # what really came to be, wherever nothing is nearer
    is_own = jnp.take_along_axis(distances, own[:, None], axis=1)[:, 0] <= jnp.min(distances, axis=1)
    like = jnp.where(is_own, own, jnp.argmin(distances, axis=1))
    traces |= {
        "example": example,
        "taken": after.action[:, example],
        "frames": steps.obs[jnp.arange(horizon + 1), example],
        "like": steps.obs[like // real_z.shape[1], like % real_z.shape[1]],
    }
    return {PREFIX + name: x for name, x in traces.items()}


def measures(traces: dict[str, np.ndarray]) -> dict[str, float]:
    """Numbers to compare runs by, of what `trace_dreams` returned, over all steps that really happened: the error of dreamed
    latents as a share of that of a model in which nothing changes, and by how much the squared error of the dreamed rewards is
    less than the variance of the real ones, as a share of that. What is no number is left out: where nothing changed, say, or
    all rewards were equal."""
    of = {name.removeprefix(PREFIX): x for name, x in traces.items()}
    alive = of["alive"] > 0
    error, still, real, dreamed = (of[name][alive].astype(float) for name in ("error", "no_change", "reward", "dreamed_reward"))
    measured = {}
    if still.sum() > 0:
        measured["dreams/latent_error"] = error.sum() / still.sum()
    if len(real) and real.var() > 1e-12 * np.mean(real**2):
        measured["dreams/explained_reward"] = 1 - np.mean((real - dreamed) ** 2) / real.var()
    return {name: float(value) for name, value in measured.items() if np.isfinite(value)}


def draw(traces: dict[str, np.ndarray]) -> "Figure":
    """The picture of what `trace_dreams` returned. It is to be understood by itself."""
    from matplotlib.figure import Figure  # here, because it takes a second to import and most runs do without

    of = {name.removeprefix(PREFIX): x for name, x in traces.items()}
    alive = of["alive"] > 0
    horizon, environments = alive.shape
    shown = np.unique(np.linspace(0, horizon, COLUMNS).round().astype(int))  # all steps, or some of them
    figure = Figure(figsize=(max(11.0, 1.25 * len(shown) + 0.6), 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1.0))

    example = of["example"]
    title = (
        f"Environment {example}, in which most happened: what was real, and what the world model dreamed of the same actions"
    )
    above.suptitle(title, fontsize=11)
    rows = above.subplots(2, len(shown), squeeze=False)
    limit = max(np.abs(of[name].astype(float)).max() for name in ("frames", "like"))
    for row, name, kind in zip(rows, ("frames", "like"), ("", "dreamed_"), strict=True):
        for axes, k in zip(row, shown, strict=True):
            lives = k == 0 or alive[k - 1, example]
            show_observation(axes, of[name][k] if lives else None, limit)
            said = []
            if k and lives:
                end = of[f"{kind}end"][k - 1, example]
                said.append(f"reward {of[f'{kind}reward'][k - 1, example]:.2g}")
                said += [f"end: {end:.0%}" if kind else "the end"] if end >= LIKELY else []
            axes.set_xlabel("\n".join(said), fontsize=8)
        row[0].set_ylabel("dreamed" if kind else "real", fontsize=10)
    for axes, k in zip(rows[0], shown, strict=True):
        axes.set_title(f"step {k}\naction {of['taken'][k - 1]}" if k else "start", fontsize=8)
    said = "A dream is numbers: its row shows the observation of this rollout whose latent is nearest.\n"
    said += f"Blank: the real episode is over. Ends less likely than {LIKELY:.0%} are not written."
    above.supxlabel(said, fontsize=8)

    below.suptitle(f"All {environments} dreams: means over those whose real episode goes on", fontsize=11)
    reward, end, error = below.subplots(1, 3)
    x = np.arange(1, horizon + 1)

    def mean(name):
        values = np.where(alive, of[name], 0.0).sum(axis=1)
        return np.where(alive.any(axis=1), values / np.maximum(alive.sum(axis=1), 1), np.nan)

    for axes, name, title in ((reward, "reward", "reward of each step"), (end, "end", "probability that the episode ends")):
        axes.plot(x, mean(name), "o-", label="real")
        axes.plot(x, mean(f"dreamed_{name}"), "x--", label="dreamed")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=8)
    still = mean("no_change")
    error.plot(x, np.divide(mean("error"), still, out=np.full(horizon, np.nan), where=still > 0), "x--", color="C1")
    error.axhline(1.0, color="gray", linewidth=1)
    error.set_title("error of the dreamed latent\n(0: none; 1: as if nothing changed)", fontsize=9)
    for axes in (reward, end, error):
        axes.set_xlabel("step of the dream", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_xlim(0.5, horizon + 0.5)
    for axes in (end, error):
        axes.set_ylim(0, None)
    return figure


def show_observation(axes: "Axes", obs: Num[np.ndarray, "*obs"] | None, limit: float) -> None:
    """An observation as a person sees it: the last of stacked frames, a grid in colors, or the numbers of a vector as bars, up
    to `limit`."""
    axes.set_xticks([])
    axes.set_yticks([])
    if obs is None:
        for side in axes.spines.values():
            side.set_visible(False)
    elif obs.ndim == 3 and min(obs.shape[1:]) >= SMALLEST_FRAME:
        axes.imshow(obs[-1], cmap="gray", vmin=0, vmax=255)
    elif obs.ndim == 3 and min(obs.shape[:2]) > 1:
        axes.imshow(in_colors(obs))
    elif obs.ndim == 2:
        axes.imshow(obs, cmap="gray")
    else:
        axes.barh(np.arange(obs.size), obs.reshape(-1))
        axes.set_xlim(-limit, limit)
        axes.axvline(0.0, color="gray", linewidth=1)
