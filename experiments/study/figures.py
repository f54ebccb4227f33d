"""Draw the figures of a comparison, and write them as PNG, or as SVG for an HTML page."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from html import escape

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from scipy import stats

from experiments.study.comparison import Aggregates, Comparison
from experiments.study.records import stretches
from utils.figures import own_style
from utils.statistics import CONFIDENCE

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#06b6d4", "#ef4444", "#84cc16")  # for white and black pages
WARNING = "#dc2626"
INK = "#010203"  # `svg` replaces it by the color of the page's text
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deep-spi",  # the same figure gives the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
Draw = Callable[[Axes], None]


def styled() -> AbstractContextManager:
    """Return a context with the style of all figures, which ignores the user's configuration."""
    return own_style(STYLE | {"axes.prop_cycle": cycler(color=COLORS)})


def color(comparison: Comparison, name: str) -> str:
    """Return the color of an algorithm, the same in all figures."""
    return COLORS[comparison.algorithms.index(name) % len(COLORS)]


def dashes(comparison: Comparison, name: str) -> str:
    """Return the line style of an algorithm, which differs between algorithms that share a color."""
    return ("-", "--", ":")[comparison.algorithms.index(name) // len(COLORS) % 3]


def mean_curve(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over runs of [runs, K] and the half-width of its interval (Student's t; NaN for one run), [K] each."""
    n = len(values)
    if n < 2:
        return values[0], np.full(values.shape[1], np.nan)
    factor = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) / np.sqrt(n)
    return values.mean(axis=0), factor * values.std(axis=0, ddof=1)


def filled(values: np.ndarray) -> np.ndarray:
    """Replace each NaN by the last number before it, if there is one."""
    last = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    return values[last]


def curves(comparison: Comparison, env_id: str, points: int, name_of_value: str, published: float | None = None) -> Draw:
    """Return a function that draws the learning curves in one game: a thin line per run, and the mean with its interval up to
    the end of the shortest run. A bin without a finished episode repeats the previous value. A circle marks the end of an
    unfinished run, and a dotted line the `published` score."""

    def draw(axes):
        seen = []
        whole = max(run.planned for name in comparison.algorithms for run in comparison.runs[name, env_id])
        for name in comparison.algorithms:
            runs = [stretches(run, points, whole) for run in comparison.runs[name, env_id]]
            if not runs:
                continue
            shade, all_values = color(comparison, name), [filled(run.value) for run in runs]
            for run, value in zip(runs, all_values, strict=True):
                axes.plot(run.step, value, color=shade, linewidth=0.6, alpha=0.5)
                if not run.is_finished:
                    axes.plot(run.step[-1], value[-1], "o", color=shade, markersize=4, fillstyle="none")
                    axes.annotate("unfinished", (run.step[-1], value[-1]), (5, 0), textcoords="offset points", fontsize=7)
            shortest = min(runs, key=lambda run: len(run.step))
            mean, half = mean_curve(np.stack([value[: len(shortest.step)] for value in all_values]))
            axes.plot(shortest.step, mean, dashes(comparison, name), color=shade, linewidth=1.8)
            axes.fill_between(shortest.step, mean - half, mean + half, color=shade, alpha=0.2, linewidth=0)
            seen.append(np.concatenate(all_values))
        if published is not None:
            axes.axhline(published, color=INK, linewidth=0.8, linestyle=":")
            seen.append(np.array([published]))
            axes.set_xlim(right=whole)  # as far as the published run went
        low, high = np.nanmin(np.concatenate(seen)), np.nanmax(np.concatenate(seen))
        margin = 0.06 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)  # of the runs only: the interval of two seeds is huge
        axes.set(title=env_id, xlabel="environment steps", ylabel=name_of_value)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.25)

    return draw


def intervals(
    comparison: Comparison, values: dict[str, tuple[float, float, float]], title: str, line: float | None = None
) -> Draw:
    """Return a function that draws each algorithm's interval as a bar, and its value as a line."""

    def draw(axes):
        axes.use_sticky_edges = False  # add a margin, so that marks at the edge are visible
        for row, (name, (value, low, high)) in enumerate(values.items()):
            axes.barh(row, max(high - low, 0.0), left=low, height=0.6, color=color(comparison, name), alpha=0.35)
            axes.plot([value, value], [row - 0.3, row + 0.3], color=color(comparison, name), linewidth=2.5)
        if line is not None:
            axes.axvline(line, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks([])
        axes.invert_yaxis()
        axes.set(title=title)
        axes.grid(alpha=0.25, axis="x")

    return draw


def profiles(comparison: Comparison, found: Aggregates, xlabel: str) -> Draw:
    """Return a function that draws the performance profile, the fraction of runs above each score."""

    def draw(axes):
        for name, (value, low, high) in found.profiles.items():
            shade = color(comparison, name)
            axes.plot(found.thresholds, value, dashes(comparison, name), color=shade, linewidth=1.5)
            axes.fill_between(found.thresholds, low, high, color=shade, alpha=0.2, linewidth=0)
        axes.set(title="performance profile", xlabel=xlabel, ylabel="fraction of runs above")
        axes.grid(alpha=0.25)

    return draw


def _figure(draws: list[Draw], size: tuple[float, float], columns: int, note: str, extra: float = 0.0) -> Figure:
    rows = -(-len(draws) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.25 * bool(note) + extra))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for draw in draws:
        draw(next(axes))
    for empty in axes:
        empty.set_axis_off()
    if note:
        figure.suptitle(note, color=WARNING, fontsize=9)
    return figure


def png(comparison: Comparison, draws: list[Draw], size: tuple[float, float], columns: int, note: str = "") -> bytes:
    """Draw a grid of subplots, each `size` inches large, above a legend, and return it as PNG."""
    columns = min(columns, len(draws))
    longest = max(len(name) for name in comparison.algorithms)
    beside = max(1, min(len(comparison.algorithms), int(size[0] * columns * 11 / (longest + 8))))
    with styled():
        lines = -(-len(comparison.algorithms) // beside)
        figure = _figure(draws, size, columns, note, 0.22 * lines + 0.1)
        handles = [
            Line2D([], [], color=color(comparison, name), linestyle=dashes(comparison, name), label=name, linewidth=2.5)
            for name in comparison.algorithms
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=beside)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def svg(draw: Draw, size: tuple[float, float], label: str, note: str = "") -> str:
    """Draw one figure and return it as SVG for an HTML page, in the color of the page's text."""
    with styled():
        out = io.StringIO()
        figure = _figure([draw], size, 1, note)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def legend(comparison: Comparison) -> str:
    """Return the HTML legend that all figures of a page share."""
    styles = {"-": "solid", "--": "dashed", ":": "dotted"}
    lines = {name: f"{styles[dashes(comparison, name)]} {color(comparison, name)}" for name in comparison.algorithms}
    return "".join(f'<span><i style="border-top: 4px {line}"></i>{escape(name)}</span>' for name, line in lines.items())
