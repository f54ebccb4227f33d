"""Scores of Atari's games, to put a return into proportion."""

import csv
import functools
from pathlib import Path
from typing import NamedTuple

from envs.atari import PLAIN, STOCHASTIC, AtariProtocol
from envs.registry import family

# human play of games that the table of 57 lacks: random, and the best score known
MORE_HUMANS = {
    "Kaboom": (2.49, 39101.0),
    "LaserGates": (139.55, 87511.0),
    "MarioBros": (120.0, 778700.0),
    "Et": (19.6, 19127.0),
}


class Reference(NamedTuple):
    """Mean returns of a game (unclipped, undiscounted): random play, a human, and the baseline."""

    random: float
    human: float
    baseline: float | None

    def human_normalized(self, episodic_return: float) -> float:
        """0 for random play, 1 for the human (Mnih et al., 2015)."""
        return (episodic_return - self.random) / (self.human - self.random)

    def relative_improvement(self, episodic_return: float) -> float | None:
        """By how much a return beats the baseline, over the baseline's absolute value: (score - baseline) / |baseline|, as in
        the official code of Deep SPI. None where there is no baseline, or it is 0."""
        if not self.baseline:
            return None
        return (episodic_return - self.baseline) / abs(self.baseline)


def _table(name: str) -> dict[str, dict[str, str]]:
    with (Path(__file__).parent / name).open() as f:
        return {row["game"]: row for row in csv.DictReader(f)}


def ale57() -> list[str]:
    """The 57 games."""
    return list(_table("ale57_scores.csv"))


def ale61() -> list[str]:
    """The 57 games and the four of `MORE_HUMANS`: those of the paper."""
    return sorted([*ale57(), *MORE_HUMANS])


@functools.cache
def reference(env_id: str, protocol: AtariProtocol = PLAIN) -> Reference | None:
    """The reference scores of an environment id such as `Breakout-v5`; None for a game of which no human score is known, and
    for what only has an Atari game's name.

    Args:
        env_id: the environment.
        protocol: sticky actions and no-ops of the games. Baselines are known for two protocols. `PLAIN`: the mean return of
            CleanRL's PPO after 10M steps (57 games). `STOCHASTIC`: the best return of a PPO run, averaged over 3 runs (the
            official code's table, 61 games).
    """
    if family(env_id) != "atari":
        return None
    game = env_id.rpartition("-")[0]
    ale57 = _table("ale57_scores.csv").get(game)
    if ale57 is None and game not in MORE_HUMANS:
        return None
    random, human = MORE_HUMANS[game] if ale57 is None else (float(ale57["random"]), float(ale57["human"]))
    baselines = {PLAIN: (ale57, "cleanrl_ppo_mean")}
    baselines[STOCHASTIC] = _table("ppo_stochastic_scores.csv").get(game), "mean_max_return"
    row, column = baselines.get(protocol, (None, ""))
    return Reference(random, human, float(row[column]) if row else None)
