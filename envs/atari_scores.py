"""Reference scores of Atari games, to normalize returns."""

import csv
import functools
from pathlib import Path
from typing import NamedTuple

from envs.atari import PLAIN, STOCHASTIC, AtariProtocol
from envs.registry import family

# (random, human) scores of games missing from ale57_scores.csv; human is the best known score
MORE_HUMANS = {
    "Kaboom": (2.49, 39101.0),
    "LaserGates": (139.55, 87511.0),
    "MarioBros": (120.0, 778700.0),
    "Et": (19.6, 19127.0),
}


class Reference(NamedTuple):
    """Mean returns of a game (unclipped, undiscounted) for random play, a human, and the baseline."""

    random: float
    human: float
    baseline: float | None

    def human_normalized(self, episodic_return: float) -> float:
        """Return the human-normalized score: 0 for random play, 1 for the human (Mnih et al., 2015)."""
        return (episodic_return - self.random) / (self.human - self.random)

    def relative_improvement(self, episodic_return: float) -> float | None:
        """Return (score - baseline) / |baseline|, as in the official code of Deep SPI. None if there is no baseline, or if it
        is 0."""
        if not self.baseline:
            return None
        return (episodic_return - self.baseline) / abs(self.baseline)


def _table(name: str) -> dict[str, dict[str, str]]:
    with (Path(__file__).parent / name).open() as f:
        return {row["game"]: row for row in csv.DictReader(f)}


def ale57() -> list[str]:
    """Return the 57 games of ale57_scores.csv."""
    return list(_table("ale57_scores.csv"))


def ale61() -> list[str]:
    """Return the 61 games of the paper: the 57 games and the four of `MORE_HUMANS`."""
    return sorted([*ale57(), *MORE_HUMANS])


@functools.cache
def reference(env_id: str, protocol: AtariProtocol = PLAIN) -> Reference | None:
    """Return the reference scores of an environment id such as `Breakout-v5`. None if no human score is known, or if the
    environment only shares the name of an Atari game.

    Args:
        env_id: the environment.
        protocol: sticky actions and no-ops. Baselines are known for two protocols. `PLAIN`: the mean return of
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
