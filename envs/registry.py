"""All environments, by id."""

from functools import partial
from typing import Any

from envs.atari import CLASSIC, PLAIN, STOCHASTIC, AtariProtocol, atari_ids, make_pool
from envs.confounding_gridworld import ENV_ID as GRIDWORLD
from envs.confounding_gridworld import ConfoundingGridworld, build_model
from envs.minatar import GAMES as MINATAR
from envs.minatar import MinAtar
from envs.protocol import Env
from envs.scan import Halves

UNDIVIDED = {"overlap_rollout": False, "num_devices": 1}  # flags for playing instead of training


def env_ids() -> list[str]:
    """Return the ids that `--env-id` accepts."""
    return [*atari_ids(), *MINATAR, GRIDWORLD, *CLASSIC]


def family(env_id: str) -> str | None:
    """Return the family of an environment: atari, minatar, gridworld or classic. Return None if the id is unknown."""
    for kind, ids in (("minatar", MINATAR), ("gridworld", (GRIDWORLD,)), ("classic", CLASSIC)):
        if env_id in ids:
            return kind
    return "atari" if env_id.endswith("-v5") and env_id in atari_ids() else None  # last, because it takes seconds


def pays_beyond_one(env_id: str) -> bool:
    """Return True if a reward of the environment can leave [-1, 1]. Return False for Atari, where --reward-clip decides."""
    return env_id == GRIDWORLD or (env_id in MINATAR and MINATAR[env_id].reward_range[1] > 1.0)


def atari_protocol(args: Any) -> AtariProtocol:
    """Return the sticky-action probability and no-op maximum that the flags set (Atari only)."""
    usual = STOCHASTIC if args.stochastic_env else PLAIN
    typed = {name: getattr(args, name) for name in AtariProtocol._fields}
    return usual._replace(**{name: value for name, value in typed.items() if value is not None})


def check_gridworld(args: Any) -> None:
    """Raise ValueError if the flags describe an invalid gridworld; see `build_model`."""
    build_model(args.gridworld_n_path, args.gridworld_epsilon, args.gamma)


def make_env(args: Any, iteration: int = 0) -> Env:
    """Create the environments that a script's flags describe, for a run that starts or resumes at `iteration`. Environments
    that cannot be saved restart there, with random streams that differ from the first start."""
    if args.env_id == GRIDWORLD:
        return ConfoundingGridworld(args.num_envs, args.seed, args.gridworld_n_path, args.gridworld_epsilon, args.gamma)
    if args.env_id in MINATAR:
        return MinAtar(args.env_id, args.num_envs, args.seed)
    flags = args.reward_clip, atari_protocol(args), args.env_step, iteration, args.full_action_space, args.num_devices
    pool = partial(make_pool, args.env_id, args.num_envs, args.seed, *flags)
    half = args.num_envs // 2
    return Halves(pool(slice(half)), pool(slice(half, None))) if args.overlap_rollout else pool()
