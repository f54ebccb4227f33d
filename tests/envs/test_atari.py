"""envpool behind the protocol: seeds, the dummy step after each end, episode statistics."""

from functools import cache
from types import SimpleNamespace

import envpool
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deep_spi
from envs.atari import STOCHASTIC
from envs.pool import Pool, env_seeds
from envs.registry import atari_protocol, env_ids, make_env, make_pool


@cache  # several tests read the same steps
def play(env_id, steps, seed=1, num_envs=4, **options):
    return play_in(make_pool(env_id, num_envs, seed, **options), steps)


def play_in(env, steps):
    """The first observations, and `steps` random steps in a scan."""
    num_envs = env.num_envs
    state, obs = env.reset()

    @jax.jit
    def run(state):
        def step(state, key):
            return env.step(state, jax.random.randint(key, (num_envs,), 0, env.num_actions))

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(0), steps))[1]

    return obs, jax.device_get(run(state))


def test_ids_and_unknown_id():
    assert {"Breakout-v5", "Pong-v5", "CartPole-v1"} <= set(env_ids())
    with pytest.raises(ValueError, match="Nope-v5"):
        make_pool("Nope-v5", 2, 0)


@pytest.mark.parametrize("env_id", ["Breakout-v5", "CartPole-v1", "Catch-v0", "ConfoundingGridworld-v0"])
def test_observations_are_what_is_said_beforehand(env_id):
    env = make_env(deep_spi.Args(env_id=env_id, num_envs=2))
    _, obs = env.reset()
    assert (env.obs_spec.shape, env.obs_spec.dtype) == (obs.shape[1:], obs.dtype)


def test_different_seeds_share_no_environment_stream():
    seeds = [env_seeds(seed, 128) for seed in range(20)]
    assert len(set(sum(seeds, []))) == 20 * 128
    assert seeds[3] == env_seeds(3, 128)
    later = [env_seeds(3, 128, iteration) for iteration in (1, 2, 3)]  # where a run goes on
    assert len({*seeds[3], *sum(later, [])}) == 4 * 128

    # and the games follow the seeds: the stochastic protocol starts each of them differently
    def frames(seed):
        pool = make_pool("Pong-v5", 4, seed, protocol=STOCHASTIC).pool
        return np.stack([pool.reset()[0], *(pool.step(np.arange(4, dtype=np.int32) + 2)[0] for _ in range(30))])

    one, same, other = (frames(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    for i in range(4):
        for j in range(4):
            assert (one[:, i] != other[:, j]).any()


def test_breakout_steps_follow_the_convention():
    _, steps = play("Breakout-v5", 300)
    done = steps.terminated | steps.truncated
    assert done.any() and steps.episode.finished.any()
    np.testing.assert_array_equal(~steps.valid[1:], done[:-1])
    assert steps.valid[0].all()
    dummy = ~steps.valid
    assert not done[dummy].any() and not steps.reward[dummy].any()
    assert (done & ~steps.episode.finished).any(), "a lost life ends no episode"
    assert not (steps.episode.finished & ~done).any()
    assert set(np.unique(steps.reward)) <= {-1.0, 0.0, 1.0}
    # the statistics, recounted: a game lasts from one end to the next, lost lives within
    for i in range(4):
        length, total = 0, 0.0
        for t in range(300):
            length += int(steps.valid[t, i])
            total += float(steps.reward[t, i])  # Breakout's lowest bricks pay 1, so that clipping changes little early on
            if steps.episode.finished[t, i]:
                assert steps.episode.episode_length[t, i] == length
                assert steps.episode.episode_return[t, i] >= total
                length, total = 0, 0.0


def test_unclipped_rewards_are_counted_when_clipped_ones_are_paid():
    _, clipped = play("SpaceInvaders-v5", 500, num_envs=2, reward_clip=True)
    _, plain = play("SpaceInvaders-v5", 500, num_envs=2, reward_clip=False)
    assert clipped.reward.max() == 1.0 and plain.reward.max() >= 5.0
    np.testing.assert_array_equal(clipped.episode.episode_return, plain.episode.episode_return)
    assert clipped.episode.finished.any()


def test_cartpole_through_the_same_protocol():
    obs, steps = play("CartPole-v1", 100)
    assert obs.shape == (4, 4) and obs.dtype == jnp.float32
    assert steps.episode.finished.any()
    ends = steps.episode.finished
    np.testing.assert_array_equal(steps.episode.episode_return[ends], steps.episode.episode_length[ends])


@pytest.mark.parametrize("env_id, steps", [("Breakout-v5", 300), ("CartPole-v1", 100)])
def test_stepping_through_python_is_the_same(env_id, steps):
    automatic = play(env_id, steps)
    assert automatic[1].episode.finished.any() and (automatic[1].reward != 0).any()
    for stepping in ("xla", "callback") if env_id == "CartPole-v1" else ("callback",):
        other = play(env_id, steps, stepping=stepping)
        for a, b in zip(jax.tree.leaves(automatic), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_where_envpool_refuses_its_operation_python_steps(monkeypatch):
    """As envpool does on macOS and Windows: its own check is made to see another system."""
    monkeypatch.setattr(envpool.python.lax, "sys", SimpleNamespace(platform="darwin"))
    with pytest.raises(RuntimeError, match="unavailable on macOS"):
        make_pool("CartPole-v1", 2, 1, stepping="xla")
    env = make_pool("CartPole-v1", 4, 1)
    assert env._send == env._callback_send and env._receive == env._callback_receive
    refused = play_in(env, 60)
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, refused, play("CartPole-v1", 60))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pong-v5"])
@pytest.mark.parametrize("stepping", ["xla", "callback"])
def test_the_step_after_a_time_limit_is_none_either(env_id, stepping):
    env = Pool(env_id, env_seeds(1, 3), (-1.0, 1.0), stepping, max_episode_steps=7)
    _, steps = play_in(env, 30)
    assert steps.truncated.any() and not (steps.truncated & steps.terminated).any()
    np.testing.assert_array_equal(~steps.valid[1:], (steps.terminated | steps.truncated)[:-1])
    assert not steps.reward[~steps.valid].any()
    np.testing.assert_array_equal(steps.episode.finished, steps.terminated | steps.truncated)  # no life was lost
    ended = steps.episode.finished
    assert (steps.episode.episode_length[ended & steps.truncated] == 7).all()
    assert (steps.episode.episode_length[ended] <= 7).all()


def atari_args(**flags):
    return deep_spi.Args(env_id="Freeway-v5", **flags)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, (0.0, 30)),
        ({"stochastic_env": True}, (0.3, 60)),
        ({"repeat_action_probability": 0.25}, (0.25, 30)),
        ({"stochastic_env": True, "noop_max": 7}, (0.3, 7)),
        ({"stochastic_env": True, "repeat_action_probability": 0.0}, (0.0, 60)),
    ],
)
def test_flags_of_the_protocol(flags, expected):
    assert atari_protocol(atari_args(**flags)) == expected
    config = make_env(atari_args(num_envs=2, **flags)).pool.spec.config
    assert (round(config.repeat_action_probability, 6), config.noop_max) == expected


def test_games_start_with_up_to_noop_max_no_ops():
    """The number of no-ops is read off Freeway's memory, compared with a game that is played one frame at a time."""
    one = {"env_type": "gymnasium", "num_envs": 1, "frame_skip": 1, "noop_max": 1}
    game, memories = envpool.make("Freeway-v5", seed=1, **one), []
    memories.append(game.reset()[1]["ram"][0])
    for _ in range(11):
        memories.append(game.step(np.zeros(1, np.int32))[-1]["ram"][0].copy())
    for longest in (1, 12):
        pool = make_env(atari_args(num_envs=longest, noop_max=longest)).pool
        ram = [pool.reset()[1]["ram"].copy() for _ in range(8)]  # an emulator takes ten times longer to make than to reset
        same = (np.concatenate(ram)[:, None] == np.array(memories))[..., np.arange(128) != 1]  # a reset leaves byte 1 as it is
        found = [np.flatnonzero(frames) for frames in same.all(axis=2)]
        assert all(len(frames) == 1 for frames in found)
        counts = np.bincount(np.concatenate(found), minlength=12)
        assert (counts[:longest] > 0).all() and not counts[longest:].any()
        assert counts.max() < 20  # uniform: 8 of each on average


@pytest.mark.parametrize("sticky", [0.0, 0.3])
def test_actions_are_repeated_with_their_probability(sticky):
    """Freeway's chicken climbs one pixel in each frame whose action is up. A step is 4 frames: where the action before was to
    wait, all 4 climb with probability 1 - p, 3 with (1 - p) p, and so on; none with p^4."""
    pool = make_env(atari_args(num_envs=4, repeat_action_probability=sticky)).pool
    climbed = []
    for _ in range(16):
        height = pool.reset()[1]["ram"][:, 14].astype(int)
        for t in range(12):  # no car is met so early
            before = height
            action = np.full(4, 1 if t % 3 == 2 else 0, np.int32)
            height = pool.step(action)[-1]["ram"][:, 14].astype(int)
            climbed += [height - before] * (t % 3 == 2)
    found = np.bincount(np.concatenate(climbed), minlength=5) / 256
    expected = [sticky**4, *((1 - sticky) * sticky**k for k in (3, 2, 1, 0))]
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 256))
    if sticky == 0.0:
        np.testing.assert_array_equal(found, expected)
