"""Each family of envpool's environments behind the protocol: observations, ends, and rewards, held against Python stepping."""

import dataclasses
import warnings
from functools import cache

import envpool
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deep_spi
import dream_spi
from envs.observations import pack, unpack
from envs.options import EnvError
from envs.pool import module_of, pool_ids, pool_options, pool_rewards, pool_spec
from envs.registry import env_ids, family, ids_like, make_env, make_pool, refusal
from utils.dreams.ends import check_ends
from utils.runs.family_defaults import FAMILY_DEFAULTS
from utils.runs.flags import RunArgs, UsageError, check_flags, make_args

# one id of each family, and the steps in which random play ends some episodes
FAMILIES = {
    "CartPole-v1": 60,
    "MountainCar-v0": 210,
    "FrozenLake-v1": 30,
    "Blackjack-v1": 12,
    "Taxi-v3": 210,
    "LunarLander-v3": 130,
    "MiniGrid-Empty-5x5-v0": 120,
    "BabyAI-GoToObj-v0": 80,
    "BigfishEasy-v0": 110,
    "MazeEasy-v0": 510,
    "Highway-v0": 50,
    "Roundabout-v0": 30,
    "Craftax-Classic-Symbolic-v1": 260,
    "Craftax-Classic-Symbolic-AutoReset-v1": 260,
    "Maze-v0": 110,
    "gfootball/academy_empty_goal-v1": 130,
}
WITHIN = {"Craftax-Classic-Symbolic-AutoReset-v1"}  # reset within the step that ends an episode
ENVS = 3
# one of each kind of observation and of end in the default run
QUICK = {"MountainCar-v0", "FrozenLake-v1", "MiniGrid-Empty-5x5-v0", "BigfishEasy-v0", "Highway-v0", *WITHIN}


def families(without=()):
    """The ids, those that are not needed in the default run marked as slow."""
    return [
        pytest.param(env_id, marks=() if env_id in QUICK else pytest.mark.slow) for env_id in FAMILIES if env_id not in without
    ]


@cache
def played(env_id):
    """The same random steps twice: by envpool in Python, and by the jitted pool. Return (Python's, the pool's, actions)."""
    steps = FAMILIES[env_id]
    pool = make_pool(env_id, ENVS, seed=4)
    seeds = [int(s) for s in np.random.SeedSequence(4).generate_state(ENVS) >> 1]
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        python = envpool.make(env_id, env_type="gymnasium", num_envs=ENVS, seed=seeds)
        first = python.reset()[0]
    actions = np.random.default_rng(0).integers(0, pool.num_actions, (steps, ENVS)).astype(np.int32)
    theirs = [python.step(action) for action in actions]
    state, obs = pool.reset()
    _, ours = jax.jit(lambda state, actions: jax.lax.scan(pool.step, state, actions))(state, jnp.asarray(actions))
    return pool, first, theirs, jax.device_get(obs), jax.device_get(ours)


@pytest.mark.parametrize("env_id", families())
def test_steps_equal_python_stepping(env_id):
    """What each step returns, and what ends: the terminal observation, then a reset step whose action is ignored, or, where a
    family resets within the step, no reset step and a marked end."""
    pool, first, theirs, obs, ours = played(env_id)
    one_array = lambda x: np.asarray(pool._pack(x))  # noqa: E731
    np.testing.assert_array_equal(obs, one_array(first))
    np.testing.assert_array_equal(ours.obs, np.stack([one_array(step[0]) for step in theirs]))
    np.testing.assert_array_equal(ours.reward, np.stack([step[1] for step in theirs]))
    terminated, truncated = (np.stack([step[i] for step in theirs]) for i in (2, 3))
    np.testing.assert_array_equal(ours.terminated, terminated)
    np.testing.assert_array_equal(ours.truncated, truncated & ~terminated)
    done = terminated | truncated
    assert done.any(), "choose more steps"
    elapsed = np.stack([step[4]["elapsed_step"] for step in theirs])
    after = np.zeros_like(done)
    after[1:] = done[:-1]
    if env_id in WITHIN:
        assert pool.resets_within and (elapsed[after] == 1).all()  # the step after an end is already the first of an episode
        np.testing.assert_array_equal(ours.valid, ~ours.truncated)
        np.testing.assert_array_equal(ours.unseen_end, done)
    else:
        assert not pool.resets_within and (elapsed[after] == 0).all() and (elapsed[~after] > 0).all()
        np.testing.assert_array_equal(ours.valid, ~after)
        assert not ours.unseen_end.any() and not ours.reward[after].any() and not done[after].any()


@pytest.mark.parametrize("env_id", families())
def test_returns_and_lengths_are_those_of_whole_episodes(env_id):
    pool, _, theirs, _, ours = played(env_id)
    total, length = np.zeros(ENVS), np.zeros(ENVS, int)
    for t, (_, reward, terminated, truncated, _) in enumerate(theirs):
        played_here = ours.valid[t] | ours.unseen_end[t]
        total, length = total + np.where(played_here, reward, 0), length + played_here
        done = terminated | truncated
        np.testing.assert_array_equal(ours.episode.finished[t], done)
        np.testing.assert_allclose(ours.episode.episode_return[t][done], total[done], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(ours.episode.episode_length[t][done], length[done])
        total, length = np.where(done, 0, total), np.where(done, 0, length)


@pytest.mark.parametrize("env_id", families(without=WITHIN | {"Blackjack-v1"}))
def test_terminal_observations_belong_to_the_episode_that_ends(env_id):
    """They are not the first observation of the next episode, and nearer to the observation before the end, on average.
    (Football's players are single pixels: however far they move, two pixels change.)"""
    _, _, _, first, ours = played(env_id)
    obs = np.concatenate([first[None], ours.obs]).reshape(len(ours.obs) + 1, ENVS, -1).astype(float)
    ends = np.argwhere((ours.terminated | ours.truncated)[:-1])
    before, next_one = ([np.abs(obs[t + 1, e] - obs[t + s, e]).mean() for t, e in ends] for s in (0, 2))
    assert min(next_one) > 0
    assert env_id.startswith("gfootball") or np.mean(before) < np.mean(next_one)


@pytest.mark.parametrize("env_id", families())
def test_rewards_stay_in_their_range(env_id):
    low, high = pool_rewards(env_id)
    rewards = played(env_id)[4].reward
    assert low <= rewards.min() and rewards.max() <= high


def test_symbols_are_within_what_the_encoder_knows():
    """MiniGrid's specification says bytes; the numbers of objects, colors and states are its constants."""
    for env_id in ("MiniGrid-Empty-5x5-v0", "BabyAI-GoToObj-v0"):
        pool, _, _, _, ours = played(env_id)
        pieces = unpack(jnp.asarray(ours.obs).reshape(-1, ours.obs.shape[-1]), pool.obs_parts)
        parts = {part.name: piece for part, piece in zip(pool.obs_parts, pieces, strict=True)}
        for part in pool.obs_parts:
            if part.kind == "symbols":
                assert (np.asarray(parts[part.name]).max(tuple(range(len(part.shape)))) < part.values).all()
        assert bytes(np.asarray(parts["mission"])[0].astype(np.uint8)).rstrip(b"\0").decode().isprintable()


def test_packing_is_undone():
    parts = pool_spec("MiniGrid-DoorKey-5x5-v0").obs_parts
    rng = np.random.default_rng(0)
    arrays = {part.name: rng.integers(0, 3, (5, *part.shape)).astype(np.uint8) for part in parts}
    arrays = jax.tree.map(jnp.asarray, arrays)
    for part, back in zip(parts, unpack(pack(arrays, parts), parts), strict=True):
        np.testing.assert_array_equal(back, arrays[part.name])


@pytest.mark.slow
def test_ids_count():
    """The families of the table in docs/environments.md can all be trained on, except for the ids that say why not."""
    counts = {"procgen": 50, "minigrid": 178, "craftax": 16, "gfootball": 18, "toy_text": 12, "box2d": 2, "classic_control": 6}
    counts |= {"highway": 34, "jumanji": 16, "atari": 104}
    found = {name: [i for i in pool_ids() if module_of(i) == name and refusal(i) is None] for name in counts}
    assert {name: len(ids) for name, ids in found.items()} == counts


@pytest.mark.parametrize(
    "env_id, said",
    [
        ("HalfCheetah-v4", "has continuous actions"),
        ("LunarLanderContinuous-v3", "has continuous actions"),
        ("Basic-v1", "has continuous actions"),
        ("BinPack-v2", "takes several actions in each step"),
        ("Chess-v1", "has several players"),
        ("MarlGrid-1AgentCluttered15x15-v0", "has several agents"),
        ("IntersectionMultiAgent-v0", "has several agents"),
        ("Game2048-v1", "has an observation that no encoder reads: board has integers"),
        ("VizdoomCustom-v1", "envpool cannot make it: "),
    ],
)
def test_what_cannot_be_trained_on_says_why(env_id, said):
    with pytest.raises(UsageError, match=f"--env-id {env_id}: {said}"):
        check_flags(RunArgs(env_id=env_id))
    assert env_id not in ids_like(env_id + "0")


@pytest.mark.parametrize(
    "env_id, options, said",
    [
        ("CoinrunEasy-v0", ("num_level=3",), "CoinrunEasy-v0 has no such option; did you mean num_levels"),
        ("CoinrunEasy-v0", ("num_levels",), "must be name=value"),
        ("CoinrunEasy-v0", ("num_levels=few",), "num_levels=few: must be an integer"),
        ("CoinrunEasy-v0", ("use_backgrounds=perhaps",), "must be true or false"),
        ("CoinrunEasy-v0", ("num_levels=1", "num_levels=2"), "num_levels is given twice"),
        ("CoinrunEasy-v0", ("num_envs=3",), "has no such option"),
        ("Pong-v5", ("noop_max=3",), "has no such option"),
        ("CartPole-v1", ("length=2",), "has no such option"),
        ("ConfoundingGridworld-v0", ("n_path=3",), "has no options"),
        ("Pong-v5", ("zero_discount_on_life_loss=true",), "zero_discount_on_life_loss"),
        ("Breakout-MinAtar", ("a=3",), "has no options"),
    ],
)
def test_wrong_options(env_id, options, said):
    assert said in refusal(env_id, options)


def test_only_images_have_a_choice_of_encoders():
    for env_id, images in (
        ("CartPole-v1", False),
        ("MiniGrid-DoorKey-5x5-v0", False),
        ("Craftax-Pixels-v1", True),
        ("Pong-v5", True),
    ):
        args = make_args(deep_spi.Args, env_id=env_id, encoder="impala")
        if images:
            check_flags(args)
        else:
            with pytest.raises(UsageError, match="--encoder impala: is used only with image observations"):
                check_flags(args)
    assert make_args(deep_spi.Args, env_id="CoinrunEasy-v0").encoder == "impala"


def test_defaults_are_those_of_the_family():
    """By each way of giving them: the family's, a script's own for a family, and a script's own for all."""
    names = ("num_envs", "num_steps", "gamma", "clip_coef")
    shapes = {
        env_id: tuple(getattr(make_args(deep_spi.Args, env_id=env_id), n) for n in names)
        for env_id in ("Pong-v5", "MazeEasy-v0")
    }
    assert shapes == {"Pong-v5": (128, 8, 0.99, 0.1), "MazeEasy-v0": (64, 256, 0.999, 0.2)}
    lander = make_args(deep_spi.Args, env_id="LunarLander-v3")
    assert lander.decoupled_repr and not make_args(dream_spi.Args, env_id="LunarLander-v3").decoupled_repr
    assert [make_args(dream_spi.Args, env_id=e).num_minibatches for e in ("Breakout-MinAtar", "MazeEasy-v0")] == [32, 8]
    assert set(FAMILY_DEFAULTS) <= {family(env_id) for env_id in env_ids()} | {"own"}
    for family_flags in FAMILY_DEFAULTS.values():
        assert family_flags.keys() <= {field.name for field in dataclasses.fields(deep_spi.Args)}


def test_options_reach_the_environment():
    """Procgen's levels are those asked for, and MiniGrid's time limit."""
    assert pool_options("CoinrunEasy-v0", ("num_levels=1", "start_level=7", "use_backgrounds=False")) == {
        "num_levels": 1, "start_level": 7, "use_backgrounds": False,
    }  # fmt: skip
    args = make_args(deep_spi.Args, env_id="CoinrunEasy-v0", num_envs=2, env_option=("num_levels=1", "start_level=7"))
    pool = make_env(args)
    _, obs = pool.reset()
    np.testing.assert_array_equal(obs[0], obs[1])  # one level
    _, other = make_env(make_args(deep_spi.Args, env_id="CoinrunEasy-v0", num_envs=2)).reset()
    assert (np.asarray(other[0]) != np.asarray(other[1])).any()
    with pytest.raises(EnvError):
        make_pool("CoinrunEasy-v0", 2, 1, typed=("nothing=1",))


def test_two_halves_do_not_hide_what_they_lack():
    """DreamSPI's end predictor must not learn from terminal observations that neither half returns."""
    flags = {"env_id": "Craftax-Classic-Symbolic-AutoReset-v1", "num_envs": 2, "end_loss": "huber"}
    for overlap in (False, True):
        args = make_args(dream_spi.Args, overlap_rollout=overlap, **flags)
        env = make_env(args)
        assert env.resets_within
        with pytest.raises(UsageError, match="--end-loss huber: learns from terminal observations"):
            check_ends(env, args)
