"""Scores of the 57 games of ALE, to put a return into proportion."""

import csv
import functools
from pathlib import Path
from typing import NamedTuple


class Reference(NamedTuple):
    """Mean returns of a game (unclipped, undiscounted): random play, a human, CleanRL's PPO after 10M steps."""

    random: float
    human: float
    cleanrl_ppo_mean: float
    cleanrl_ppo_std: float

    def human_normalized(self, episodic_return: float) -> float:
        """0 for random play, 1 for the human (Mnih et al., 2015)."""
        return (episodic_return - self.random) / (self.human - self.random)

    def relative_improvement(self, episodic_return: float) -> float:
        """By how much a return beats CleanRL's PPO, over what the better of PPO and human gain on random play
        (Wang et al., 2016, equation 10)."""
        best = max(self.human, self.cleanrl_ppo_mean)
        return (episodic_return - self.cleanrl_ppo_mean) / (best - self.random)


@functools.cache
def _table() -> dict[str, Reference]:
    with (Path(__file__).parent / "ale57_scores.csv").open() as f:
        return {row.pop("game"): Reference(**{k: float(v) for k, v in row.items()}) for row in csv.DictReader(f)}


def reference(env_id: str) -> Reference | None:
    """The reference scores of an environment id such as `Breakout-v5`; None for what is not in ALE-57."""
    return _table().get(env_id.rpartition("-")[0])
