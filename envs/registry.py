"""Every environment there is, by its id."""

from typing import Any

from envs.atari import CLASSIC, atari_ids, make_pool
from envs.confounding_gridworld import ENV_ID as GRIDWORLD
from envs.confounding_gridworld import ConfoundingGridworld, build_model
from envs.protocol import Env


def env_ids() -> list[str]:
    """The ids that `--env-id` takes."""
    return [*atari_ids(), *CLASSIC, GRIDWORLD]


def is_atari(env_id: str) -> bool:
    """Whether the id is that of a game."""
    return env_id in atari_ids()


def check_gridworld(args: Any) -> None:
    """Raises ValueError where the gridworld cannot have the size that the flags ask for."""
    build_model(args.gridworld_n_path, args.gridworld_epsilon, args.gamma)


def make_env(args: Any, iteration: int = 0) -> Env:
    """The environments that a script's flags ask for, of a run that goes on from that iteration. Those that cannot be saved
    start anew there, with other streams than at the beginning."""
    if args.env_id == GRIDWORLD:
        return ConfoundingGridworld(args.num_envs, args.seed, args.gridworld_n_path, args.gridworld_epsilon, args.gamma)
    return make_pool(args.env_id, args.num_envs, args.seed, args.reward_clip, args.stochastic_env, args.env_step, iteration)
