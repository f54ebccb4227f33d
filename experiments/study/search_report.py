"""What a search has found: the best command, a table of its trials, and a figure with one panel for each flag."""

import math
import shlex
import sys
from pathlib import Path

import optuna
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from experiments.study.figures import COLORS, INK, WARNING, styled
from experiments.study.plan import script_path, to_paste
from experiments.study.search import Search
from experiments.study.space import Space, as_words
from utils.files import write_csv
from utils.runs.folder import ROOT

TABLE, SLICES = "trials.csv", "slices.png"
PANELS = 3  # in a row


def best_trial(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """Return the complete trial with the highest value, the earliest if there are several; None if no trial is complete."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def best_command(search: Search, args_type: type, trial: FrozenTrial) -> str:
    """Return the command that trains with the values of the trial, in the first environment."""
    asked, path = search.settings, script_path(search.settings.script)
    words = [f"--env-id={asked.env_ids[0]}", *asked.flags, *as_words(trial.params, args_type)]
    if path.parent == ROOT:
        return f"uv run {shlex.join([path.name, *words])}"
    return to_paste([sys.executable, str(path), *words])


def importances(search: Search) -> dict[str, float]:
    """Return the importance of each flag (Optuna's PED-ANOVA); empty if the complete trials do not suffice."""
    complete = [trial for trial in search.trials() if trial.state == TrialState.COMPLETE]
    if len(complete) < 2 or len({trial.value for trial in complete}) < 2:
        return {}
    return optuna.importance.get_param_importances(search.study)


def write_table(search: Search, path: Path) -> None:
    """Write a row for each trial."""
    names, env_ids = list(search.space), search.settings.env_ids
    rows = []
    for trial in search.trials():
        attrs, value = trial.user_attrs, "" if trial.value is None else f"{trial.value:.6g}"
        scores = [f"{attrs[f'return {e}']:.6g}" if f"return {e}" in attrs else "" for e in env_ids]
        state = "diverged" if attrs["diverged"] else trial.state.name.lower().replace("fail", "failed")
        rows.append(
            (trial.number, state, value, *(trial.params[name] for name in names), *scores, attrs["seconds"], attrs["reason"])
        )
    write_csv(path, ("trial", "state", "value", *names, *env_ids, "seconds", "reason"), rows)


def draw_slices(trials: list[FrozenTrial], space: Space, path: Path) -> None:
    """Draw the value of each trial over the values of each flag. A ring is the best trial, a small dot a pruned one, and a
    cross at the lower edge one that failed."""
    best = best_trial(trials)
    valued = [trial.value for trial in trials if trial.value is not None and trial.state != TrialState.FAIL]
    low, high = min(valued, default=0.0), max(valued, default=1.0)
    floor = low - 0.08 * ((high - low) or 1.0)
    rows = math.ceil(len(space) / PANELS)
    with styled():
        width = min(PANELS, len(space))
        figure = Figure(figsize=(3.2 * width, 2.5 * rows))
        panels = figure.subplots(rows, width, sharey=True, squeeze=False)
        for panel in panels.flat[len(space) :]:
            panel.set_axis_off()
        for panel, (name, distribution) in zip(panels.flat, space.items(), strict=False):
            choices = list(distribution.choices) if isinstance(distribution, CategoricalDistribution) else None
            place = choices.index if choices else float
            for trial in trials:
                x, failed = place(trial.params[name]), trial.state == TrialState.FAIL
                marker = {"color": WARNING, "marker": "x"} if failed else {"color": COLORS[0], "marker": "o", "linewidth": 0}
                size = 6 if trial.state == TrialState.PRUNED else 18
                panel.scatter(x, floor if failed else trial.value, size, alpha=0.6, **marker)
            if best is not None:
                panel.scatter(place(best.params[name]), best.value, 70, facecolors="none", edgecolors=INK, linewidths=1.2)
            if choices:
                panel.set_xticks(range(len(choices)), [choice or "(none)" for choice in choices])
                panel.set_xlim(-0.5, len(choices) - 0.5)
            else:
                low, high = distribution.low, distribution.high
                panel.set_xscale("log" if distribution.log else "linear")
                ticks = low, math.sqrt(low * high) if distribution.log else (low + high) / 2, high
                panel.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
                panel.set_xticks([], minor=True)
            panel.set_xlabel(f"--{name}")
            panel.grid(alpha=0.25)
        for row in panels:
            row[0].set_ylabel("scaled return")
        figure.savefig(path, dpi=150)


def write_report(search: Search, args_type: type) -> list[str]:
    """Write table and figure to the search's folder. Return the lines to print."""
    trials, best = search.trials(), best_trial(search.trials())
    count = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    diverged = sum(trial.user_attrs["diverged"] for trial in trials)
    lines = [
        f"{len(trials)} trials: {count[TrialState.COMPLETE]} complete, {count[TrialState.PRUNED]} pruned, {diverged} diverged, "
        f"{count[TrialState.FAIL] - diverged} failed"
    ]
    if trials:
        try:
            write_table(search, search.logdir / TABLE)
            draw_slices(trials, search.space, search.logdir / SLICES)
            lines.append(f"table and figure: {search.logdir / TABLE}, {search.logdir / SLICES}")
        except OSError as error:  # another user's folder, or a full disk
            lines.append(f"*** table and figure are not written: {error.strerror} ***")
    if found := importances(search):
        lines.append("importance: " + ", ".join(f"--{name} {value:.2f}" for name, value in found.items()))
    if best is not None:
        scores = ", ".join(f"{e} {best.user_attrs[f'return {e}']:.3g}" for e in search.settings.env_ids)
        lines += [f"best: trial {best.number}, {best.value:.3f} ({scores})", best_command(search, args_type, best)]
    return lines
