"""Compare algorithms x games x seeds: find missing runs, normalize scores, and aggregate them over games."""

import re
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np

from envs.atari import AtariProtocol
from envs.atari_scores import Reference, reference
from envs.registry import atari_protocol, family
from experiments.study.records import RunRecord, Unread, final_score, flag_name, labels, split_flags
from utils import statistics
from utils.runs.flags import UsageError, require

FIRST = ("ppo", "deep_mdp_ppo", "deep_spi", "dream_spi")  # order of algorithms in figures and tables
SAID = 4  # runs that a message names
ON, OFF = "on", "off"  # values of switches
STEPS, PROTOCOL = "steps", "Atari protocol"
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
        missing: one line for each run that is missing, unfinished or diverged, but not for skipped runs.
    """

    algorithms: list[str]
    env_ids: list[str]
    seeds: list[int]
    runs: dict[tuple[str, str], list[RunRecord]]
    missing: list[str]


def compare(runs: list[RunRecord], planned: list[Unread] = (), skipped: list[Unread] = ()) -> Comparison:
    """Arrange runs in a grid of algorithms, games and seeds, and list missing runs.

    Args:
        runs: runs to compare.
        planned: runs that are expected too.
        skipped: runs that cannot be compared. They are not listed, because a message has named them.

    Raises:
        UsageError: there are no runs, or two runs have the same place in the grid.
    """
    require(len(runs) > 0, "no readable runs: name folders of runs or of studies, or tables")
    names = labels(runs, [*planned, *skipped])
    places = [(name, run.env_id, run.seed) for name, run in zip(names, [*runs, *planned, *skipped], strict=True)]
    names, expected = names[: len(runs)], dict.fromkeys(places[len(runs) : len(runs) + len(planned)])
    named = set(places[len(runs) + len(planned) :])
    rank = lambda name: (FIRST.index(name.split()[0]) if name.split()[0] in FIRST else len(FIRST), name)  # noqa: E731
    algorithms = sorted(set(names), key=rank)
    env_ids, seeds = sorted({run.env_id for run in runs}), sorted({run.seed for run in runs})
    found, missing = {}, []
    for env_id in env_ids:
        for name in algorithms:
            own = {run.seed: run for n, run in zip(names, runs, strict=True) if (n, run.env_id) == (name, env_id)}
            found[name, env_id] = [own[seed] for seed in sorted(own)]
            for seed in seeds:
                place = name, env_id, seed
                if seed not in own and place not in named:
                    said = "planned, but not found" if place in expected else "not found"
                    missing.append(f"{name}, {env_id}, seed {seed}: {said}")
                elif seed in own and not own[seed].is_finished:
                    of = f"{own[seed].reached:,} of {own[seed].planned:,} steps"
                    at = f"unfinished, at {of}" if own[seed].diverged is None else f"diverged, at {of}"
                    missing.append(f"{name}, {env_id}, seed {seed}: {at}")
    for name, env_id, seed in expected:
        in_grid = name in algorithms and env_id in env_ids and seed in seeds
        if not in_grid and (name, env_id, seed) not in named:
            missing.append(f"{name}, {env_id}, seed {seed}: planned, but not found")
    return Comparison(algorithms, env_ids, seeds, found, missing)


def run_protocol(run: RunRecord) -> AtariProtocol:
    """Return the sticky-action probability and the maximum number of no-ops; they apply only to Atari."""
    typed = flag_values(run)
    number = lambda flag, kind: kind(typed[flag]) if typed.get(flag, "None") != "None" else None  # noqa: E731
    try:
        flags = AtariProtocol(number("repeat-action-probability", float), number("noop-max", int))
    except ValueError:
        raise UsageError(f"{run.source}: its flags are damaged ({run.flags}); leave it out") from None
    return atari_protocol(SimpleNamespace(stochastic_env=typed.get("stochastic-env") == ON, **flags._asdict()))


def protocol_words(protocol: AtariProtocol) -> str:
    """Return the protocol in words."""
    sticky, noops = protocol
    return f"sticky actions {sticky:g}, up to {noops} no-ops"


def flag_values(run: RunRecord) -> dict[str, str]:
    """Return the values of a run's non-default flags by name; those of switches are `ON` and `OFF`."""
    found = {}
    for word in split_flags(run.flags):
        name, value = flag_name(word), re.split("[ =]", f"{word} ", maxsplit=1)[1].strip()
        negated = word.startswith(f"--no-{name}")
        found[name] = {"": OFF if negated else ON, "True": ON, "False": OFF}.get(value, value)
    return found


def run_settings(run: RunRecord) -> dict[str, str | None]:
    """Return how a run was made: its non-default flags, steps (also those before it was extended), Atari protocol, commit and
    versions. None: unknown, or does not apply."""
    found: dict[str, str | None] = {f"--{name}": value for name, value in flag_values(run).items()}
    found[STEPS] = f"{run.planned:,}"
    if family(run.env_id) == "atari":
        found[PROTOCOL] = protocol_words(run_protocol(run))
    found["extended"] = run.extended
    found["commit"] = run.commit and run.commit[:12]
    found["uncommitted changes"] = None if run.dirty is None else ("yes" if run.dirty else "no")
    return found | {f"version of {name}": str(version) for name, version in (run.versions or {}).items()}


def differing_settings(comparison: Comparison) -> list[list[str]]:
    """Return a table of the settings in which the runs differ: a header, and one row per setting with each algorithm's values.
    Unknown values are shown, but are no difference."""
    made = {name: [] for name in comparison.algorithms}
    for (name, _), runs in comparison.runs.items():
        made[name] += [(run, run_settings(run)) for run in runs]
    every = [(run, of) for pairs in made.values() for run, of in pairs]
    settings = dict.fromkeys(setting for _, of in every for setting in of)

    def value(setting, run, of):
        if setting.startswith("--"):
            return of.get(setting, "-")
        if setting.startswith("version of ") and run.versions is not None:
            return of.get(setting, "not installed")
        return of.get(setting)

    rows = []
    for setting in sorted(settings, key=lambda name: (name not in (STEPS, PROTOCOL), name)):
        if len({value(setting, *pair) for pair in every} - {None}) > 1:
            cells = (dict.fromkeys(value(setting, *pair) or "unknown" for pair in made[name]) for name in made)
            if setting == PROTOCOL:  # games that are not Atari have none
                cells = (dict.fromkeys(of[PROTOCOL] for _, of in made[name] if PROTOCOL in of) for name in made)
            rows.append([setting, *(", ".join(cell) or "-" for cell in cells)])
    return [["", *made], *rows] if rows else []


def unequal(comparison: Comparison, table: list[list[str]]) -> list[str]:
    """Return a warning for each of steps and Atari protocol in which the runs differ, of the table of `differing_settings`."""
    planned = [run.planned for runs in comparison.runs.values() for run in runs]
    warned = []
    for setting, *cells in table[1:]:
        # runs of the same --total-timesteps differ by less than a rollout
        if setting == PROTOCOL or (setting == STEPS and max(planned) - min(planned) > 0.01 * max(planned)):
            said = "; ".join(f"{name} {cell}" for name, cell in zip(comparison.algorithms, cells, strict=True))
            warned.append(f"The compared runs differ in {setting}: {said}")
    return warned


def usual_scale(comparison: Comparison) -> Scale:
    """Return the default scale: human if a human score is known for all games, else min-max."""
    return "human" if all(reference(env_id) for env_id in comparison.env_ids) else "min-max"


def raw_scores(comparison: Comparison, points: int, last: int) -> dict[tuple[str, str], np.ndarray]:
    """Return the `final_score` of each finished run, by algorithm and game."""
    scores = lambda runs: np.array([final_score(run, points, last) for run in runs if run.is_finished])  # noqa: E731
    return {key: scores(runs) for key, runs in comparison.runs.items()}


def complete_games(comparison: Comparison, raw: dict[tuple[str, str], np.ndarray]) -> list[str]:
    """Return the games in which every algorithm has a finished run."""
    return [env_id for env_id in comparison.env_ids if all(len(raw[name, env_id]) for name in comparison.algorithms)]


def normalized(
    comparison: Comparison, raw: dict[tuple[str, str], np.ndarray], scale: Scale, against: str
) -> dict[str, list[np.ndarray]]:
    """Return the scores of each algorithm, game by game, on a common scale (`SCALES`). Games in which some algorithm has no
    finished run are skipped.

    Raises:
        UsageError: the scale is undefined for a game, or no game is left.
    """
    env_ids = complete_games(comparison, raw)
    require(len(env_ids) > 0, "nothing to aggregate: no game has a finished run of every algorithm; finish more runs")
    scores = {name: [] for name in comparison.algorithms}
    for env_id in env_ids:
        of_game = [run for name in comparison.algorithms for run in comparison.runs[name, env_id]]
        known = reference(env_id)
        every = np.concatenate([raw[name, env_id] for name in comparison.algorithms])
        low, width = every.min(), np.ptp(every) or 1.0
        if scale == "human":
            unfit = f"no human score is known for {env_id} ({sources(of_game)})"
            require(known is not None, f"--scale human: {unfit}; use --scale min-max")
            convert = known.human_normalized
        elif scale == "baseline":
            known = baseline(env_id, of_game)
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


def sources(runs: list[RunRecord]) -> str:
    """Return the first few sources of the runs, for a message."""
    return ", ".join([run.source for run in runs[:SAID]] + [f"{len(runs) - SAID} more"] * (len(runs) > SAID))


def baseline(env_id: str, runs: list[RunRecord]) -> Reference:
    """Return the published score of a game, under the protocol of the runs.

    Raises:
        UsageError: the runs differ in their protocol, or there is no score for it.
    """
    of_protocol: dict[AtariProtocol, list[RunRecord]] = {}
    for run in runs:
        of_protocol.setdefault(run_protocol(run), []).append(run)
    said = [f"{protocol_words(protocol)}: {sources(of)}" for protocol, of in of_protocol.items()]
    remedy = "; use --scale min-max"
    require(len(said) == 1, f"--scale baseline: runs of {env_id} differ in their protocol ({'; '.join(said)}){remedy}")
    known = reference(env_id, run_protocol(runs[0]))
    require(known is not None and bool(known.baseline), f"--scale baseline: {env_id} has no baseline for {said[0]}{remedy}")
    return known


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
