"""Every script on every family of environments: three updates with finite losses."""

import jax
import numpy as np
import pytest

import deep_mdp_ppo
import deep_spi
import dream_spi
import ppo_atari_envpool_xla_jax_scan as ppo
from envs.registry import make_env
from tests.probes import make_iteration
from utils.runs.flags import check_flags, make_args

FAMILIES = [
    "MountainCar-v0",
    "FrozenLake-v1",
    "LunarLander-v3",
    "MiniGrid-DoorKey-5x5-v0",
    "BabyAI-GoToObj-v0",
    "CoinrunEasy-v0",
    "Highway-v0",
    "TwoWay-v0",
    "Craftax-Classic-Symbolic-AutoReset-v1",
    "Craftax-Classic-Pixels-v1",
    "gfootball/academy_empty_goal-v1",
    "Maze-v0",
    "Snake-v1",
]
DEFAULT = [(ppo, "MiniGrid-DoorKey-5x5-v0")]


def cases():
    for script in (ppo, deep_mdp_ppo, deep_spi, dream_spi):
        for env_id in FAMILIES:
            marks = () if (script, env_id) in DEFAULT else pytest.mark.slow
            yield pytest.param(script, env_id, marks=marks, id=f"{script.__name__}-{env_id}")


@pytest.mark.parametrize("script, env_id", cases())
def test_three_updates_have_finite_losses(script, env_id):
    """With the family's defaults, but small rollouts."""
    sizes = {"num_envs": 8, "num_steps": 16, "num_minibatches": 4, "fc_layers": (16,), "total_timesteps": 3 * 8 * 16}
    args = make_args(script.Args, env_id=env_id, **sizes)
    check_flags(args)
    env = make_env(args)
    agent, optimizer = script.make_agent(args, env.num_actions, env.obs_parts), script.make_optimizer(args)
    iteration = make_iteration(script, env, agent, optimizer, args)
    state = script.init_state(args, env, agent, optimizer)
    start = jax.device_get(state.params)
    for _ in range(3):
        state, metrics = iteration(state)
        assert all(np.isfinite(value).all() for name, value in jax.device_get(metrics).items() if name.startswith("losses/"))
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (start, jax.device_get(state.params))), strict=True)]
    assert np.mean(moved) > 0.8 and int(state.iteration) == 3
