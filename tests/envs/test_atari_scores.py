"""Scores of games, by hand."""

import pytest

from envs.atari import STOCHASTIC, AtariProtocol
from envs.atari_scores import MORE_HUMANS, reference


def test_human_normalized():
    pong = reference("Pong-v5")
    assert pong.human_normalized(pong.random) == 0 and pong.human_normalized(pong.human) == 1
    assert reference("Breakout-v5").human_normalized(1.7 + 28.8) == pytest.approx(1.0)  # random 1.7, human 30.5
    for env_id in ("CartPole-v1", "ConfoundingGridworld-v0", "Breakout-MinAtar"):
        assert reference(env_id) is None


def test_relative_improvement_is_over_the_baselines_absolute_value():
    alien = reference("Alien-v5")  # CleanRL's PPO: 1736.39
    assert alien.relative_improvement(1736.39) == 0
    assert alien.relative_improvement(2 * 1736.39) == pytest.approx(1.0)
    assert alien.relative_improvement(0.0) == pytest.approx(-1.0)
    pitfall = reference("Pitfall-v5")
    assert pitfall.baseline == 0 and pitfall.relative_improvement(-5.0) is None


def test_a_negative_baseline_is_beaten_by_a_larger_return():
    double_dunk = reference("DoubleDunk-v5")
    assert double_dunk.baseline < 0
    assert double_dunk.relative_improvement(double_dunk.baseline / 2) == pytest.approx(0.5)
    assert double_dunk.relative_improvement(2 * double_dunk.baseline) == pytest.approx(-1.0)


def test_the_stochastic_protocol_has_a_baseline_of_its_own():
    alien = reference("Alien-v5", protocol=STOCHASTIC)
    assert (alien.baseline, alien.human) == (1498.96, reference("Alien-v5").human)
    assert alien.relative_improvement(2 * 1498.96) == pytest.approx(1.0)
    other = reference("Alien-v5", AtariProtocol(0.25, 30))
    assert other.human == alien.human and other.relative_improvement(2 * 1498.96) is None


@pytest.mark.parametrize("game", MORE_HUMANS)
def test_the_four_further_games(game):
    assert reference(f"{game}-v5").baseline is None
    assert reference(f"{game}-v5").relative_improvement(1.0) is None
    stochastic = reference(f"{game}-v5", protocol=STOCHASTIC)
    random, human = {
        "Kaboom": (2.49, 39101.0), "LaserGates": (139.55, 87511.0), "MarioBros": (120.0, 778700.0), "Et": (19.6, 19127.0)
    }[game]  # fmt: skip
    assert stochastic.human_normalized(random) == 0 and stochastic.human_normalized(human) == 1
    assert stochastic.baseline is not None
