"""A figure of dreams: the world model's predictions for the actions of a real rollout, compared with that rollout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, UInt8

from envs.minatar import in_colors
from envs.observations import channels_first, is_image
from utils.figures import own_style
from utils.runs.flag_types import MAY_CHANGE, Count, Needs, Switch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREFIX = "dreams/trace/"  # prefix of the names of the arrays to draw, see `trace_dreams`
PICTURE = "dreams/dream"  # name of the figure
COLUMNS = 9  # maximum number of frames drawn per dream
LIKELY = 0.05  # smaller termination probabilities are not printed below a frame


@dataclass
class DreamTraceArgs:
    """Flags of the figure of dreams."""

    log_dreams: Switch = False
    """log a figure that compares dreams with the real rollout, given the same actions: one dream frame by frame, and means over
    all dreams of rewards, terminations and latent errors. It covers a dream's steps, or a shorter rollout's"""
    log_dreams_every: Annotated[Count, MAY_CHANGE, Needs(log_dreams=True)] = 100
    """updates between two figures"""


def trace_dreams(params: Any, steps: Any, key: jax.Array, agent: Any, args: Any, dream_step: Callable) -> dict[str, Array]:
    """Return the arrays of a figure: dreams from the first latents of a rollout, with its actions, next to the rollout.

    H is the shorter of a dream's horizon and the rollout's length. `alive` [H, B] is 1 until the real episode ends, after which
    there is nothing to compare with. `error` is the distance from the dreamed to the real next latent, and `no_change` the
    distance from the first latent to it. Distances are Euclidean for continuous latents; for categorical ones, they are the
    fraction of variables that differ. One dream, with the most rewards and terminations, is returned step by step: its
    environment `example`, its actions `taken` [H], and the real observations `frames` [H+1, *obs]. For each of its latents,
    `like` [H+1, *obs] is the observation of the whole rollout whose latent is nearest.

    Args:
        params, agent: a script's networks, preferably with parameters that have not been trained on this rollout.
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
        goes_on = alive * ~(real.terminated | real.truncated)
        next_z, reward, ends = dream_step(params, z, real.action, key, agent, args)
        return (next_z, goes_on), (
            {
                "alive": alive,
                "reward": real.reward,
                "dreamed_reward": reward,
                "end": real.terminated.astype(jnp.float32),
                "dreamed_end": ends,
                "error": jnp.where(real.unseen_end, 0.0, distance(next_z, real.obs)),
                "no_change": jnp.where(real.unseen_end, 0.0, distance(real_z[0], real.obs)),
            },
            next_z,
        )

    start = real_z[0], jnp.ones(real_z.shape[1])
    _, (traces, dreamed_z) = jax.lax.scan(step, start, (after, jax.random.split(key, horizon)))
    happened = jnp.abs(traces["reward"]) + traces["end"] + 0.1  # 0.1 prefers long episodes
    example = jnp.argmax(jnp.sum(traces["alive"] * happened, axis=0))
    of_example = jnp.concatenate([real_z[:1, example], dreamed_z[:, example]]).reshape(horizon + 1, -1)
    flat = real_z.reshape(-1, of_example.shape[1])
    # |a - b|^2 without |a|^2, which does not affect the argmin over b
    distances = jnp.sum(flat**2, axis=1) - 2.0 * jnp.matmul(of_example, flat.T, precision="highest")
    own = jnp.arange(horizon + 1) * real_z.shape[1] + example  # on a tie, take the real observation of that step
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
    """Return metrics for comparing runs from the arrays of `trace_dreams`, over all steps before the real episode ends.

    `dreams/latent_error` is the latent error divided by the error of predicting no change. `dreams/explained_reward` is 1 -
    mean squared reward error / variance of the real rewards. Undefined metrics are omitted.
    """
    of = {name.removeprefix(PREFIX): x for name, x in traces.items()}
    alive = of["alive"] > 0
    error, still, real, dreamed = (of[name][alive].astype(float) for name in ("error", "no_change", "reward", "dreamed_reward"))
    measured = {}
    if still.sum() > 0:
        measured["dreams/latent_error"] = error.sum() / still.sum()
    if len(real) and real.var() > 1e-12 * np.mean(real**2):
        measured["dreams/explained_reward"] = 1 - np.mean((real - dreamed) ** 2) / real.var()
    return {name: float(value) for name, value in measured.items() if np.isfinite(value)}


def picture(traces: dict[str, np.ndarray]) -> UInt8[np.ndarray, "3 H W"]:
    """Return the figure of `draw` as an image, the same whatever the user's Matplotlib configuration says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with own_style():
        canvas = FigureCanvasAgg(draw(traces))
        canvas.draw()
        return np.moveaxis(np.asarray(canvas.buffer_rgba())[:, :, :3], -1, 0)


def draw(traces: dict[str, np.ndarray]) -> "Figure":
    """Draw the arrays of `trace_dreams` in a self-explanatory figure."""
    from matplotlib.figure import Figure  # imported here: it takes a second, and most runs do not need it

    of = {name.removeprefix(PREFIX): x for name, x in traces.items()}
    alive = of["alive"] > 0
    horizon, environments = alive.shape
    shown = np.unique(np.linspace(0, horizon, COLUMNS).round().astype(int))  # all steps, or some of them
    figure = Figure(figsize=(max(11.0, 1.25 * len(shown) + 0.6), 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1.0))

    example = of["example"]
    title = f"Environment {example} (most rewards and terminations): the real rollout, and a dream with the same actions"
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
                said += [f"end: {end:.0%}" if kind else "episode ends"] if end >= LIKELY else []
            axes.set_xlabel("\n".join(said), fontsize=8)
        row[0].set_ylabel("dreamed" if kind else "real", fontsize=10)
    for axes, k in zip(rows[0], shown, strict=True):
        axes.set_title(f"step {k}\naction {of['taken'][k - 1]}" if k else "start", fontsize=8)
    said = "Dreamed row: for each dreamed latent, the observation of this rollout whose latent is nearest.\n"
    said += f"Blank: the real episode has ended. Termination probabilities below {LIKELY:.0%} are not shown."
    above.supxlabel(said, fontsize=8)

    below.suptitle(f"All {environments} dreams: means over those whose real episode has not ended", fontsize=11)
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
    error.set_title("error of the dreamed latent\n(0: exact; 1: same as predicting no change)", fontsize=9)
    for axes in (reward, end, error):
        axes.set_xlabel("step of the dream", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_xlim(0.5, horizon + 0.5)
    for axes in (end, error):
        axes.set_ylim(0, None)
    return figure


def show_observation(axes: "Axes", obs: Num[np.ndarray, "*obs"] | None, limit: float) -> None:
    """Draw an observation: an RGB image, the last of stacked frames, a grid in colors, or a vector's elements as bars up to
    `limit`. None leaves the axes blank."""
    axes.set_xticks([])
    axes.set_yticks([])
    if obs is None:
        for side in axes.spines.values():
            side.set_visible(False)
    elif is_image(obs.shape):
        image = np.moveaxis(obs, 0, -1) if channels_first(obs.shape) else obs
        image = image if image.shape[-1] == 3 else image[..., -1]
        axes.imshow(image, cmap="gray", vmin=0, vmax=255 if obs.dtype == np.uint8 else 1)
    elif obs.ndim == 3 and min(obs.shape[:2]) > 1:
        axes.imshow(in_colors(obs))
    elif obs.ndim == 2:
        axes.imshow(obs, cmap="gray")
    else:
        axes.barh(np.arange(obs.size), obs.reshape(-1))
        axes.set_xlim(-limit, limit)
        axes.axvline(0.0, color="gray", linewidth=1)
