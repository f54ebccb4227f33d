"""Compare algorithms x games x seeds: find missing runs, normalize scores, and aggregate them over games."""

from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np

from envs.atari import AtariProtocol
from envs.atari_scores import reference
from envs.registry import atari_protocol
from experiments.study.grid import PlannedRun
from experiments.study.records import RunRecord, final_score, labels, split_flags
from utils import statistics
from utils.runs.flags import require

FIRST = ("ppo", "deep_mdp_ppo", "deep_spi", "dream_spi")  # order of algorithms in figures and tables
Scale = Literal["human", "baseline", "min-max", "against"]
SCALES = {
    "human": "0 is random play, 1 is the human score",
    "baseline": "relative improvement over the published PPO score, (score - baseline) / |baseline|",
    "min-max": "for each game, 0 is the lowest and 1 the highest score of the compared runs",
    "against": "1 is the mean score of the reference algorithm (--against) on the same game",
}


class Comparison(NamedTuple):
    """All runs to compare.

    Attributes:
        algorithms: names, in the order of figures.
        env_ids: the games.
        seeds: all seeds of any algorithm.
        runs: by algorithm and game, sorted by seed.
        missing: one line for each run that is missing or unfinished.
    """

    algorithms: list[str]
    env_ids: list[str]
    seeds: list[int]
    runs: dict[tuple[str, str], list[RunRecord]]
    missing: list[str]


def compare(runs: list[RunRecord], planned: list[PlannedRun] = ()) -> Comparison:
    """Arrange runs in a grid of algorithms, games and seeds, and list missing runs that the grid or `planned` expects.

    Raises:
        UsageError: there are no runs, or two runs have the same place in the grid.
    """
    require(len(runs) > 0, "no readable runs: name folders of runs or of studies, or tables")
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
                    missing.append(f"{name}, {env_id}, seed {seed}: not found")
                elif not own[seed].is_finished:
                    at = f"unfinished, at {own[seed].reached:,} of {own[seed].planned:,} steps"
                    missing.append(f"{name}, {env_id}, seed {seed}: {at}")
    known = {(name.split()[0], env_id, seed) for name in algorithms for env_id in env_ids for seed in seeds}
    for run in planned:
        script = run.script.split("__")[0]
        if (script, run.env_id, run.seed) not in known:
            missing.append(f"{script}, {run.env_id}, seed {run.seed}: planned, but not found")
    return Comparison(algorithms, env_ids, seeds, found, missing)


def run_protocol(run: RunRecord) -> AtariProtocol:
    """Return the sticky-action probability and the maximum number of no-ops; they apply only to Atari."""
    typed = dict(word.removeprefix("--").partition(" ")[::2] for word in split_flags(run.flags))
    number = lambda flag, kind: kind(typed[flag]) if flag in typed else None  # noqa: E731
    flags = number("repeat-action-probability", float), number("noop-max", int)
    return atari_protocol(SimpleNamespace(stochastic_env="stochastic-env" in typed, **AtariProtocol(*flags)._asdict()))


def usual_scale(comparison: Comparison) -> Scale:
    """Return the default scale: human if a human score is known for all games, else min-max."""
    return "human" if all(reference(env_id) for env_id in comparison.env_ids) else "min-max"


def raw_scores(comparison: Comparison, points: int, last: int) -> dict[tuple[str, str], np.ndarray]:
    """Return the `final_score` of each finished run, by algorithm and game."""
    scores = lambda runs: np.array([final_score(run, points, last) for run in runs if run.is_finished])  # noqa: E731
    return {key: scores(runs) for key, runs in comparison.runs.items()}


def normalized(
    comparison: Comparison, raw: dict[tuple[str, str], np.ndarray], scale: Scale, against: str
) -> dict[str, list[np.ndarray]]:
    """Return the scores of each algorithm, game by game, on a common scale (`SCALES`). Games in which some algorithm has no
    finished run are skipped.

    Raises:
        UsageError: the scale is undefined for a game, or no game is left.
    """
    env_ids = [env_id for env_id in comparison.env_ids if all(len(raw[name, env_id]) for name in comparison.algorithms)]
    require(len(env_ids) > 0, "nothing to aggregate: no game has a finished run of every algorithm; finish more runs")
    scores = {name: [] for name in comparison.algorithms}
    for env_id in env_ids:
        of_game = [run for name in comparison.algorithms for run in comparison.runs[name, env_id]]
        protocols = {run_protocol(run) for run in of_game}
        known = reference(env_id, min(protocols))
        every = np.concatenate([raw[name, env_id] for name in comparison.algorithms])
        low, width = every.min(), np.ptp(every) or 1.0
        if scale == "human":
            require(known is not None, f"--scale human: no human score is known for {env_id}; use --scale min-max")
            convert = known.human_normalized
        elif scale == "baseline":
            require(len(protocols) == 1, f"--scale baseline: runs of {env_id} differ in their protocol; use --scale min-max")
            require(
                known is not None and bool(known.baseline), f"--scale baseline: {env_id} has no baseline; use --scale min-max"
            )
            convert = known.relative_improvement
        elif scale == "against":
            mean = float(np.mean(raw[against, env_id]))
            require(mean > 0, f"--scale against: {against} has a mean score of {mean:g} on {env_id}; use --scale min-max")
            convert = lambda score, mean=mean: score / mean  # noqa: E731
        else:
            convert = lambda score, low=low, width=width: (score - low) / width  # noqa: E731
        for name in comparison.algorithms:
            scores[name].append(np.array([convert(score) for score in raw[name, env_id]]))
    return scores


class Aggregates(NamedTuple):
    """Statistics over games, each a value and the ends of its interval: `statistics` by name and algorithm; `profiles`, the
    fraction of runs above each threshold; `improvement`, the probability of improvement over the reference algorithm."""

    statistics: dict[str, dict[str, tuple[float, float, float]]]
    thresholds: np.ndarray
    profiles: dict[str, np.ndarray]  # [3, K]
    improvement: dict[str, tuple[float, float, float]]


def aggregate(scores: dict[str, list[np.ndarray]], scale: Scale, against: str, seed: int) -> Aggregates:
    """Compute all statistics, with intervals from `statistics.RESAMPLINGS` bootstrap resamples of a generator with `seed`."""
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
