"""Ids of environments: what a wrong one may mean."""

import pytest

from envs.atari import atari_ids
from envs.minatar import GAMES
from envs.registry import GRIDWORLD, env_ids, family, ids_like
from utils.runs.flags import RunArgs, UsageError, check_flags

PONG = ("PongNoFrameskip-v4", "ALE/Pong-v5", "PongDeterministic-v4", "Pong-ramNoFrameskip-v4", "Pong-ram-v0", "Pong-v0", "pong")
PONG += ("Pong", "pong-v5", "ALE/Pong-ram-v5", "PONG")


@pytest.mark.parametrize("env_id", PONG)
def test_names_of_other_libraries(env_id):
    with pytest.raises(UsageError) as error:
        check_flags(RunArgs(env_id=env_id))
    assert str(error.value) == f"--env-id {env_id}: no such environment; did you mean Pong-v5?"


@pytest.mark.parametrize(
    "env_id, expected",
    [
        ("space_invaders", ["SpaceInvaders-v5", "SpaceInvaders-MinAtar"]),  # either
        ("SpaceInvadersNoFrameskip-v4", ["SpaceInvaders-v5"]),
        ("MinAtar/SpaceInvaders-v1", ["SpaceInvaders-MinAtar"]),
        ("minatar-breakout", ["Breakout-MinAtar"]),
        ("BrakoutNoFrameskip-v4", ["Breakout-v5"]),
        ("Brekout-MinAtar", ["Breakout-MinAtar"]),
        ("CartPole-v7", ["CartPole-v0", "CartPole-v1", "phys2d/CartPole-v0"]),
        ("LunarLander-v1", ["LunarLander-v2", "LunarLander-v3"]),
        ("CoinrunEasy-v1", ["CoinrunEasy-v0"]),
        ("ms_pacman", ["MsPacman-v5"]),
        ("HalfCheetah-v4", []),
        ("", []),
    ],
)
def test_what_a_wrong_id_may_mean(env_id, expected):
    assert ids_like(env_id) == expected


def test_every_game_is_among_those_like_it():
    games = [*GAMES, GRIDWORLD, *atari_ids()[::12]]
    assert {*games, *atari_ids()} <= set(env_ids())
    assert [ids_like(env_id)[0] for env_id in games] == games


def test_families_outside_envpool_are_known_without_importing_it(monkeypatch):
    """Importing it takes a second, and happens at each start. No id has the scripts' own defaults."""

    def imported():
        raise AssertionError("envpool would be imported")

    monkeypatch.setattr("envs.pool._registry", imported)
    ids = (GRIDWORLD, "Breakout-MinAtar", "my_envs.py:Corridor", "")
    assert [family(env_id) for env_id in ids] == ["gridworld", "minatar", "own", None]
    with pytest.raises(AssertionError):
        family("Pong-v5")
