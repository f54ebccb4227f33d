"""Stacks of frames that are stored once: the same observations as stacks that hold each frame four times."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import deep_spi
from envs.atari import FramePool, Pool, env_seeds
from envs.frames import STACK, Newest, Stacks, observations
from envs.scan import keep
from utils.dreams import replay

GAMES = (
    "Alien Asteroids Asterix BeamRider Boxing Centipede ChopperCommand DoubleDunk Enduro Freeway Frostbite Kangaroo MsPacman "
    "Pong PrivateEye Qbert Seaquest SpaceInvaders Tennis"
).split()


def rollouts(env, actions):
    """Yields, for each rollout with actions [K, T, B]: observations, rewards, flags, and where games ended."""

    def step(carry, action):
        env_state, obs = carry
        kept = keep(env, env_state, obs)
        env_state, after = env.step(env_state, action)
        told = after.reward, after.terminated, after.truncated, after.valid, after.episode.finished
        return (env_state, after.obs), (kept, told)

    @jax.jit
    def rollout(env_state, first, actions):
        (env_state, last), (kept, told) = jax.lax.scan(step, (env_state, first), actions)
        return env_state, last, observations(first, kept, keep(env, env_state, last)), told

    carry = env.reset()
    for of_rollout in actions:
        *carry, obs, told = rollout(*carry, of_rollout)
        yield jax.device_get((obs[jnp.arange(len(obs))], *told))


TRAINING = {"episodic_life": True, "reward_clip": True}
STOCHASTIC = TRAINING | {"repeat_action_probability": 0.3, "noop_max": 60}
MACHADO = {"episodic_life": False, "noop_max": 1, "use_fire_reset": False, "repeat_action_probability": 0.25}


@pytest.mark.parametrize(
    "game, options",
    [
        ("Breakout", TRAINING),
        ("Breakout", STOCHASTIC | {"max_episode_steps": 70}),
        ("RoadRunner", STOCHASTIC),  # where games end in the no-ops after a lost life
        pytest.param("RoadRunner", TRAINING, marks=pytest.mark.slow),
        *(pytest.param(game, TRAINING, marks=pytest.mark.slow) for game in GAMES),
        *(pytest.param("Breakout", options, marks=pytest.mark.slow) for options in (STOCHASTIC, MACHADO)),
    ],
)
def test_stacks_are_those_of_envpool(game, options):
    """Through lost lives, ends of games and time limits, within rollouts and between them."""
    plain, stacked = (kind(f"{game}-v5", env_seeds(3, 4), (-1.0, 1.0), **options) for kind in (Pool, FramePool))
    assert plain.obs_spec == stacked.obs_spec
    length = {"Breakout": 100, "RoadRunner": 150}.get(game, 2_000)
    actions = np.random.default_rng(0).integers(0, plain.num_actions, (12, length, 4))
    flags = []
    for expected, found in zip(rollouts(plain, actions), rollouts(stacked, actions), strict=True):
        for a, b in zip(expected, found, strict=True):
            assert_array_equal(a, b)
        flags.append(expected[2:])
    terminated, truncated, _, finished = map(np.stack, zip(*flags, strict=True))
    assert finished.any() and truncated.any() == ("max_episode_steps" in options)
    if game == "Breakout" and options["episodic_life"]:
        assert (terminated & ~finished).any()
    if game == "RoadRunner":
        assert (finished & ~(terminated | truncated)).any()


def numbered(begins):
    """Stacks [T, B, S, 1, 1] of frames with a number each, where a game begins with the frames so marked, and their ages."""
    stacks, ages = [], []
    for t, new in enumerate(begins):
        frame = (np.arange(len(new)) * 60 + t)[:, None, None, None]
        moved = np.concatenate([stacks[-1][:, 1:], frame], 1) if stacks else frame.repeat(STACK, 1)
        new = new | (t == 0)
        stacks.append(np.where(new[:, None, None, None], frame, moved))
        ages.append(np.where(new, 0, np.minimum(ages[-1] + 1, STACK - 1) if ages else 0))
    return np.stack(stacks).astype(np.uint8), np.stack(ages).astype(np.int8)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=6, max_size=20), st.data())
def test_stacks_are_indexed_as_an_array(begins, data):
    """A rollout of a stream of frames that begins anywhere in it."""
    stacks, ages = numbered(np.array(begins))
    start = data.draw(st.integers(0, len(begins) - 2))
    kept = [Newest(jnp.asarray(stacks[t][:, -1]), jnp.asarray(ages[t])) for t in range(start, len(begins))]
    before = jax.tree.map(lambda *x: jnp.stack(x), *kept[:-1])
    found, expected = observations(jnp.asarray(stacks[start]), before, kept[-1]), stacks[start:]
    assert isinstance(found, Stacks) and len(found) == len(expected) and found.frames.shape[0] == len(found) + STACK - 1
    assert_array_equal(found[jnp.arange(len(found))], expected)
    assert_array_equal(found[1], expected[1])
    assert_array_equal(found[-1], expected[-1])
    assert_array_equal(np.asarray(found), expected)
    t = np.array([[len(expected) - 1, 0, 1]]).T
    env = np.array([2, 0])
    assert_array_equal(found[t, env], expected[t, env])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=40, max_size=40), st.integers(0, 99))
def test_replayed_sequences_have_their_stacks(begins, seed):
    """Rollouts of 8 steps in a buffer of 24: what a sequence begins with reaches back to steps before it."""
    stacks, ages = numbered(np.array(begins))
    sizes = SimpleNamespace(num_envs=2, num_steps=8, replay_capacity=48, replay_batch_size=200, replay_length=3)
    spec = jax.ShapeDtypeStruct((STACK, 1, 1), jnp.uint8)
    buffer = replay.init_replay(SimpleNamespace(obs_spec=spec, num_actions=3, stacks_frames=True), sizes)
    number = lambda t: jnp.asarray(t[:, None] + 100.0 * np.arange(2), jnp.float32)  # noqa: E731
    for first in range(0, 32, 8):
        t = np.arange(first, first + 9)
        kept = [Newest(jnp.asarray(stacks[i][:, -1]), jnp.asarray(ages[i])) for i in t]
        obs = observations(jnp.asarray(stacks[first]), jax.tree.map(lambda *x: jnp.stack(x), *kept[:-1]), kept[-1])
        false = jnp.zeros((8, 2), bool)
        steps = (obs, None, jnp.zeros((8, 2), jnp.int32), jnp.zeros((8, 2, 3)), number(t[:-1]), false, false, ~false, None)
        buffer = replay.add(buffer, deep_spi.Rollout(*steps), sizes)
    found = replay.sample(buffer, jax.random.key(seed), sizes)
    t, env = np.asarray(found.reward).astype(int) % 100, np.asarray(found.reward).astype(int) // 100
    assert t.shape == (4, 200) and t.min() == 8 + STACK - 1 and t.max() == 31  # of the 24 steps that are held, 3 stand before
    assert_array_equal(found.obs[jnp.arange(4)], stacks[t, env])
