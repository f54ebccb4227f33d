"""Stacks of frames that are stored once: the same observations as stacks that hold each frame four times."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

import deep_spi
from envs.atari import FramePool
from envs.frames import STACK, Newest, Stacks, observations
from envs.pool import Pool, env_seeds
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
        yield np.asarray(obs), *jax.device_get(told)


TRAINING = {"episodic_life": True, "reward_clip": True}
STOCHASTIC = TRAINING | {"repeat_action_probability": 0.3, "noop_max": 60}
MACHADO = {"episodic_life": False, "noop_max": 1, "use_fire_reset": False, "repeat_action_probability": 0.25}


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "game, options, shape",
    [
        ("Breakout", STOCHASTIC | {"max_episode_steps": 160}, (4, 60)),
        ("RoadRunner", STOCHASTIC, (4, 60)),  # where games end in the no-ops after a lost life
        *(slow("RoadRunner", options, (12, 150)) for options in (STOCHASTIC, TRAINING)),
        *(slow(game, TRAINING, (12, 2_000)) for game in GAMES),
        *(slow("Breakout", options, (12, 100)) for options in (TRAINING, STOCHASTIC, MACHADO)),
    ],
)
def test_stacks_are_those_of_envpool(game, options, shape):
    """Through lost lives, ends of games and time limits, within rollouts and between them."""
    plain, stacked = (kind(f"{game}-v5", env_seeds(3, 4), (-1.0, 1.0), **options) for kind in (Pool, FramePool))
    assert plain.obs_spec == stacked.obs_spec
    actions = np.random.default_rng(0).integers(0, plain.num_actions, (*shape, 4))
    flags = []
    for expected, found in zip(rollouts(plain, actions), rollouts(stacked, actions), strict=True):
        for a, b in zip(expected, found, strict=True):
            assert_array_equal(a, b)
        flags.append(expected[2:])
    terminated, truncated, _, finished = map(np.stack, zip(*flags, strict=True))
    assert (finished & ~truncated).any() and truncated.any() == ("max_episode_steps" in options)
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


def kept_of(stacks, ages):
    """What is stored of stacks [T, B, S, 1, 1]: the first stack, of all steps but the last one, and of the last one."""
    frames = stacks[:, :, -1]
    return stacks[0], Newest(frames[:-1], ages[:-1]), Newest(frames[-1], ages[-1])


ENV = np.array([2, 0])


@jax.jit
def indexed(kept, t):
    """The stacks, and what is read of them: by steps, by a step from either end, and by steps and environments."""
    found = observations(*kept)
    return found, found[jnp.arange(len(found))], found[1], found[-1], found[t, ENV]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=16, max_size=16),
    st.integers(0, 9),
    st.sampled_from([2, 7]),  # each length is a program
)
def test_stacks_are_indexed_as_an_array(begins, start, length):
    """A rollout of a stream of frames that begins anywhere in it."""
    stacks, ages = (x[start : start + length] for x in numbered(np.array(begins)))
    t = np.array([[length - 1, 0, 1]]).T
    found, *read = indexed(kept_of(stacks, ages), t)
    assert isinstance(found, Stacks) and len(found) == length and found.frames.shape[0] == length + STACK - 1
    for actual, expected in zip(read, (stacks, stacks[1], stacks[-1], stacks[t, ENV]), strict=True):
        assert_array_equal(actual, expected)
    assert_array_equal(np.asarray(found), stacks)


SIZES = SimpleNamespace(
    use_replay_buffer=True, num_envs=2, num_steps=8, replay_capacity=48, replay_batch_size=200, replay_length=3
)


@jax.jit
def init_replay():
    spec = jax.ShapeDtypeStruct((STACK, 1, 1), jnp.uint8)
    return replay.init_replay(SimpleNamespace(obs_spec=spec, num_actions=3, stacks_frames=True), SIZES)


@jax.jit
def add(buffer, kept, reward):
    false = jnp.zeros((8, 2), bool)
    told = reward, false, false, ~false, None, false
    steps = deep_spi.Rollout(observations(*kept), None, jnp.zeros((8, 2), jnp.int32), jnp.zeros((8, 2, 3)), *told)
    return replay.add(buffer, steps, SIZES)


@jax.jit
def sample(buffer, seed):
    found = replay.sample(buffer, jax.random.key(seed), SIZES)
    return found.reward, found.obs[jnp.arange(4)]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=40, max_size=40), st.integers(0, 99))
def test_replayed_sequences_have_their_stacks(begins, seed):
    """Rollouts of 8 steps in a buffer of 24: what a sequence begins with reaches back to steps before it."""
    stacks, ages = numbered(np.array(begins))
    number = lambda t: (t[:, None] + 100.0 * np.arange(2)).astype(np.float32)  # noqa: E731
    buffer = init_replay()
    for first in range(0, 32, 8):
        here = slice(first, first + 9)
        buffer = add(buffer, kept_of(stacks[here], ages[here]), number(np.arange(first, first + 8)))
    reward, obs = jax.device_get(sample(buffer, seed))
    t, env = reward.astype(int) % 100, reward.astype(int) // 100
    assert t.shape == (4, 200) and t.min() == 8 + STACK - 1 and t.max() == 31  # of the 24 steps that are held, 3 stand before
    assert_array_equal(obs, stacks[t, env])
