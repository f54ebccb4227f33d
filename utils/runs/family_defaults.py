"""Defaults of flags in families of environments (`envs.registry.family`), in all scripts, with their sources.

They are those of flags with the annotation `BY_FAMILY`. A script that declares a flag anew, without it, has its own default.
"""

from typing import Any

FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    # docs/minatar.md: learning rate, minibatches and dense layers were chosen on unreported seeds
    "minatar": {"num_envs": 64, "num_steps": 128, "num_minibatches": 8, "learning_rate": 1e-3, "fc_layers": ()}
    | {"total_timesteps": 5_000_000},
    # classic control and toy text: CleanRL's ppo.py, with twice the environments and four times the learning rate
    "classic": {"num_envs": 8, "num_steps": 128, "minibatch_by": "transition", "learning_rate": 1e-3}
    | {"total_timesteps": 500_000},
    # Cobbe et al. (2020), arXiv 1912.01588, appendix D; 25M steps is their budget for the easy games
    "procgen": {"num_envs": 64, "num_steps": 256, "num_minibatches": 8, "update_epochs": 3, "learning_rate": 5e-4}
    | {"gamma": 0.999, "clip_coef": 0.2, "encoder": "impala", "fc_layers": (256,), "total_timesteps": 25_000_000},
    # rl-starter-files, the training code that MiniGrid's documentation names (minibatches of 256 transitions)
    "minigrid": {"num_envs": 16, "num_steps": 128, "num_minibatches": 8, "minibatch_by": "transition", "learning_rate": 1e-3}
    | {"clip_coef": 0.2, "total_timesteps": 1_000_000},
    # LunarLander: PPO in RL Baselines3 Zoo (minibatches of 64 transitions, separate networks for actor and critic)
    "box2d": {"num_envs": 16, "num_steps": 1024, "num_minibatches": 256, "minibatch_by": "transition", "learning_rate": 3e-4}
    | {"gamma": 0.999, "gae_lambda": 0.98, "clip_coef": 0.2, "fc_layers": (64,), "decoupled_repr": True}
    | {"total_timesteps": 1_000_000},
    # PPO in HighwayEnv's script for Stable Baselines3 (minibatches of 64 transitions), with more environments
    "highway": {"num_envs": 16, "num_steps": 64, "num_minibatches": 16, "minibatch_by": "transition", "learning_rate": 5e-4}
    | {"update_epochs": 10, "gamma": 0.8, "clip_coef": 0.2, "fc_layers": (256,), "total_timesteps": 200_000},
    # PPO in Craftax Baselines (Matthews et al., 2024), with an eighth of the environments
    "craftax": {"num_steps": 64, "num_minibatches": 8, "learning_rate": 2e-4, "gae_lambda": 0.8, "clip_coef": 0.2},
    # an environment of your own: those of MinAtar, with minibatches of single transitions
    "own": {"num_envs": 64, "num_steps": 128, "num_minibatches": 8, "minibatch_by": "transition", "learning_rate": 1e-3}
    | {"total_timesteps": 1_000_000},
}
