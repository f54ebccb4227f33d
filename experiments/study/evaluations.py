"""The tables of games that evaluate.py left in the folders of compared runs."""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from evaluate import COLUMNS, OPTION
from experiments.study.comparison import Comparison
from experiments.study.records import RunRecord, table_rows
from utils.runs.flags import UsageError

PATTERN = "evaluation*.csv"
AS_TRAINED = "as in training"


def kind_of(row: dict[str, str]) -> str:
    """Describe how a game was played: protocol, actions, and options of the environment."""
    protocol = AS_TRAINED if row["protocol"] == "train" else row["protocol"]
    return ", ".join(filter(None, (protocol, "greedy" * (row["greedy"] == "1"), row.get(OPTION) or "")))


def games_of(run: RunRecord) -> tuple[dict[str, list[float]], list[str]]:
    """Return the returns of the games played after a run's last step, by their kind, and the problems of its tables. A game in
    several tables counts once. Games differ in seed, number of environments, environment, or number of games played there
    before."""
    found, problems = {}, []
    for path in sorted(Path(run.source).glob(PATTERN)) if os.path.isdir(run.source) else []:
        try:
            names, rows = table_rows(path)
            if not set(COLUMNS) <= set(names):
                raise ValueError
            envs, played = len({row["env"] for row in rows}), Counter()
            for row in rows:
                place = row["seed"], envs, row["env"]
                game = *place, played[place]
                played[place] += 1
                if int(row["step"]) == run.reached:
                    found.setdefault(kind_of(row), {})[game] = float(row["episodic_return"])
        except (UsageError, OSError, ValueError, TypeError, KeyError):
            problems.append(f"{path}: is not a whole table of games; left out of the evaluations")
    return {kind: list(games.values()) for kind, games in found.items()}, problems


def evaluations(comparison: Comparison) -> tuple[list[list[str]], list[str]]:
    """Return a table of evaluated returns, empty if nothing was evaluated, and the problems of the files.

    Rows are environments and kinds of evaluation. Cells are mean and standard deviation over runs of each run's mean."""
    found, problems = {}, []
    for (name, env_id), runs in comparison.runs.items():
        for run in runs:
            games, said = games_of(run)
            problems += said
            for kind, returns in games.items():
                found.setdefault((env_id, kind), {}).setdefault(name, []).append((np.mean(returns), len(returns)))

    def cell(of: list[tuple[float, int]]) -> str:
        if not of:
            return "-"
        means, games = zip(*of, strict=True)
        spread = f" ± {np.std(means, ddof=1):.3g}" if len(means) > 1 else ""
        return f"{np.mean(means):.4g}{spread} ({len(means)} {'run' if len(means) == 1 else 'runs'}, {sum(games)} games)"

    rows = [
        [env_id, kind, *(cell(of.get(name, [])) for name in comparison.algorithms)]
        for (env_id, kind), of in sorted(found.items())
    ]
    return [["", "played", *comparison.algorithms], *rows] if rows else [], problems
