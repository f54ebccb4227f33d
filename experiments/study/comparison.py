"""Algorithms x games x seeds, side by side: what is missing, scores on a common scale, and aggregates of them."""

import re
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np

from envs.atari import AtariProtocol
from envs.registry import atari_protocol
from experiments.study.grid import PlannedRun
from experiments.study.records import RunRecord, final_score, labels
from utils import statistics
from utils.runs.flags import require
from utils.runs.scores import reference

FIRST = ("ppo", "deep_mdp_ppo", "deep_spi", "dream_spi")  # algorithms in the order of figures and tables
Scale = Literal["human", "baseline", "min-max", "against"]
SCALES = {
    "human": "0 is random play, 1 a human's score",
    "baseline": "relative improvement on the published PPO: (score - baseline) / |baseline|",
    "min-max": "of each game 0 is the lowest score of the runs compared, 1 the highest",
    "against": "1 is the mean score of the algorithm that others are compared with, on the same game",
}


class Comparison(NamedTuple):
    """All runs to compare.

    Attributes:
        algorithms: names, in the order of figures.
        env_ids: the games.
        seeds: all that any algorithm has.
        runs: by algorithm and game, by seed.
        missing: a line for each run that is not there, or not finished.
    """

    algorithms: list[str]
    env_ids: list[str]
    seeds: list[int]
    runs: dict[tuple[str, str], list[RunRecord]]
    missing: list[str]


def compare(runs: list[RunRecord], planned: list[PlannedRun] = ()) -> Comparison:
    """Sorts runs, and finds what is missing in the grid of all their algorithms, games and seeds, and of what was planned.

    Raises:
        UsageError: there are no runs, or two are the same.
    """
    require(len(runs) > 0, "no run can be read; name folders of runs, of studies, or tables of them")
    names = labels(runs)
    rank = lambda name: (FIRST.index(name.split()[0]) if name.split()[0] in FIRST else len(FIRST), name)  # noqa: E731
    algorithms = sorted(set(names), key=rank)
    env_ids, seeds = sorted({run.env_id for run in runs}), sorted({run.seed for run in runs})
    found, missing = {}, []
    for env_id in env_ids:
        for name in algorithms:
            own = {run.seed: run for n, run in zip(names, runs, strict=True) if (n, run.env_id) == (name, env_id)}
            found[name, env_id] = [own[seed] for seed in sorted(own)]
            for seed in seeds:
                if seed not in own:
                    missing.append(f"{name}, {env_id}, seed {seed}: there is no run")
                elif not own[seed].is_finished:
                    at = f"is at {own[seed].reached:,} of {own[seed].planned:,} steps"
                    missing.append(f"{name}, {env_id}, seed {seed}: {at}")
    known = {(name.split()[0], env_id, seed) for name in algorithms for env_id in env_ids for seed in seeds}
    for run in planned:
        script = run.script.split("__")[0]
        if (script, run.env_id, run.seed) not in known:
            missing.append(f"{script}, {run.env_id}, seed {run.seed}: is planned, and not there")
    return Comparison(algorithms, env_ids, seeds, found, missing)


def run_protocol(run: RunRecord) -> AtariProtocol:
    """Sticky actions and no-ops of the run's games, of Atari alone."""
    typed = dict(word.removeprefix("--").partition(" ")[::2] for word in re.split(r" (?=--)", run.flags) if word)
    number = lambda flag, kind: kind(typed[flag]) if flag in typed else None  # noqa: E731
    flags = number("repeat-action-probability", float), number("noop-max", int)
    return atari_protocol(SimpleNamespace(stochastic_env="stochastic-env" in typed, **AtariProtocol(*flags)._asdict()))


def usual_scale(comparison: Comparison) -> Scale:
    """The scale if none is asked for: human play where it is known of all games."""
    return "human" if all(reference(env_id) for env_id in comparison.env_ids) else "min-max"


def raw_scores(comparison: Comparison, points: int, last: int) -> dict[tuple[str, str], np.ndarray]:
    """The final score of each finished run (`final_score`), by algorithm and game."""
    scores = lambda runs: np.array([final_score(run, points, last) for run in runs if run.is_finished])  # noqa: E731
    return {key: scores(runs) for key, runs in comparison.runs.items()}


def normalized(
    comparison: Comparison, raw: dict[tuple[str, str], np.ndarray], scale: Scale, against: str
) -> dict[str, list[np.ndarray]]:
    """The scores of each algorithm, game by game, on a common scale (`SCALES`). Of an incomplete grid, the games of which all
    algorithms have finished a run.

    Raises:
        UsageError: the scale is not known of a game, or there is no such game.
    """
    env_ids = [env_id for env_id in comparison.env_ids if all(len(raw[name, env_id]) for name in comparison.algorithms)]
    require(len(env_ids) > 0, "there is no game of which all algorithms have finished a run: nothing can be aggregated")
    scores = {name: [] for name in comparison.algorithms}
    for env_id in env_ids:
        of_game = [run for name in comparison.algorithms for run in comparison.runs[name, env_id]]
        protocols = {run_protocol(run) for run in of_game}
        known = reference(env_id, min(protocols))
        every = np.concatenate([raw[name, env_id] for name in comparison.algorithms])
        low, width = every.min(), np.ptp(every) or 1.0
        if scale == "human":
            require(known is not None, f"--scale human: there is no human score of {env_id}; say --scale min-max")
            convert = known.human_normalized
        elif scale == "baseline":
            require(len(protocols) == 1, f"--scale baseline: runs of {env_id} differ in their protocol; say --scale min-max")
            require(
                known is not None and bool(known.baseline), f"--scale baseline: there is none of {env_id}; say --scale min-max"
            )
            convert = known.relative_improvement
        elif scale == "against":
            mean = float(np.mean(raw[against, env_id]))
            require(mean > 0, f"--scale against: {against} has a mean score of {mean:g} on {env_id}; say --scale min-max")
            convert = lambda score, mean=mean: score / mean  # noqa: E731
        else:
            convert = lambda score, low=low, width=width: (score - low) / width  # noqa: E731
        for name in comparison.algorithms:
            scores[name].append(np.array([convert(score) for score in raw[name, env_id]]))
    return scores


class Aggregates(NamedTuple):
    """Statistics of scores over games: for each of `statistics` and each algorithm the value and the ends of its interval; the
    share of runs above each threshold, likewise; and how probably each algorithm improves on the first one."""

    statistics: dict[str, dict[str, tuple[float, float, float]]]
    thresholds: np.ndarray
    profiles: dict[str, np.ndarray]  # [3, K]
    improvement: dict[str, tuple[float, float, float]]


def aggregate(scores: dict[str, list[np.ndarray]], scale: Scale, against: str, seed: int) -> Aggregates:
    """All statistics, each with an interval from `statistics.RESAMPLINGS` resamplings by a generator with that seed."""
    target = 0.0 if scale == "baseline" else 1.0
    functions = dict(statistics.AGGREGATES)
    functions["optimality gap"] = lambda x: statistics.optimality_gap(x, target)
    rng = np.random.default_rng(seed)
    drawn = {name: statistics.resample(x, rng) for name, x in scores.items()}
    ends = [np.concatenate(x) for x in scores.values()]
    thresholds = np.linspace(min(0.0, min(x.min() for x in ends)), max(x.max() for x in ends), 101)

    def both(value, resampled):
        low, high = statistics.interval(resampled)
        return float(value), float(low), float(high)

    return Aggregates(
        {what: {name: both(f(scores[name]), f(drawn[name])) for name in scores} for what, f in functions.items()},
        thresholds,
        {
            name: np.stack(
                [
                    statistics.performance_profile(x, thresholds),
                    *statistics.interval(statistics.performance_profile(drawn[name], thresholds)),
                ]
            )
            for name, x in scores.items()
        },
        {
            name: both(
                statistics.probability_of_improvement(x, scores[against]),
                statistics.probability_of_improvement(drawn[name], drawn[against]),
            )
            for name, x in scores.items()
            if name != against
        },
    )
