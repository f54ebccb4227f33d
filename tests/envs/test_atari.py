"""envpool behind the protocol: seeds, the dummy step after each end, episode statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deep_spi
from envs.atari import env_seeds, make_pool
from envs.registry import env_ids, make_env


def play(env_id, steps, seed=1, num_envs=4, **options):
    env = make_pool(env_id, num_envs, seed, **options)
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
    # and the games follow the seeds: the stochastic protocol starts each of them differently
    (a, one), (_, same), (_, other) = (play("Pong-v5", 30, seed, stochastic=True) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.obs, same.obs)
    for i in range(4):
        for j in range(4):
            assert (one.obs[:, i] != other.obs[:, j]).any()


def test_breakout_steps_follow_the_convention():
    _, steps = play("Breakout-v5", 400, reward_clip=True)
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
        for t in range(400):
            length += int(steps.valid[t, i])
            total += float(steps.reward[t, i])  # Breakout's lowest bricks pay 1, so that clipping changes little early on
            if steps.episode.finished[t, i]:
                assert steps.episode.episode_length[t, i] == length
                assert steps.episode.episode_return[t, i] >= total
                length, total = 0, 0.0


def test_unclipped_rewards_are_counted_when_clipped_ones_are_paid():
    _, clipped = play("SpaceInvaders-v5", 600, reward_clip=True)
    _, plain = play("SpaceInvaders-v5", 600, reward_clip=False)
    assert clipped.reward.max() == 1.0 and plain.reward.max() >= 5.0
    np.testing.assert_array_equal(clipped.episode.episode_return, plain.episode.episode_return)
    assert clipped.episode.finished.any()


def test_cartpole_through_the_same_protocol():
    obs, steps = play("CartPole-v1", 100)
    assert obs.shape == (4, 4) and obs.dtype == jnp.float32
    assert steps.episode.finished.any()
    ends = steps.episode.finished
    np.testing.assert_array_equal(steps.episode.episode_return[ends], steps.episode.episode_length[ends])
