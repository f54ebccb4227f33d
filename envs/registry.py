"""Every environment there is, by its id."""

from functools import partial
from typing import Any

from envs.atari import CLASSIC, PLAIN, STOCHASTIC, AtariProtocol, atari_ids, make_pool
from envs.confounding_gridworld import ENV_ID as GRIDWORLD
from envs.confounding_gridworld import ConfoundingGridworld, build_model
from envs.minatar import GAMES as MINATAR
from envs.minatar import MinAtar
from envs.protocol import Env
from envs.scan import Halves

UNDIVIDED = {"overlap_rollout": False, "num_devices": 1}  # of what is played, not trained


def env_ids() -> list[str]:
    """The ids that `--env-id` takes."""
    return [*atari_ids(), *MINATAR, GRIDWORLD, *CLASSIC]


def family(env_id: str) -> str | None:
    """Of what kind the environment is: atari, minatar, gridworld or classic; None if there is no such id."""
    for kind, ids in (("minatar", MINATAR), ("gridworld", (GRIDWORLD,)), ("classic", CLASSIC)):
        if env_id in ids:
            return kind
    return "atari" if env_id.endswith("-v5") and env_id in atari_ids() else None  # which is asked last, for it takes seconds


def pays_beyond_one(env_id: str) -> bool:
    """Whether a step may pay an agent more than 1 or less than -1, where nothing clips it; Atari aside."""
    return env_id == GRIDWORLD or (env_id in MINATAR and MINATAR[env_id].reward_range[1] > 1.0)


def atari_protocol(args: Any) -> AtariProtocol:
    """Sticky actions and no-ops that a run's flags ask for, of Atari alone."""
    usual = STOCHASTIC if args.stochastic_env else PLAIN
    typed = {name: getattr(args, name) for name in AtariProtocol._fields}
    return usual._replace(**{name: value for name, value in typed.items() if value is not None})


def check_gridworld(args: Any) -> None:
    """Raises ValueError where the gridworld cannot have the size that the flags ask for."""
    build_model(args.gridworld_n_path, args.gridworld_epsilon, args.gamma)


def make_env(args: Any, iteration: int = 0) -> Env:
    """The environments that a script's flags ask for, of a run that goes on from that iteration. Those that cannot be saved
    start anew there, with other streams than at the beginning."""
    if args.env_id == GRIDWORLD:
        return ConfoundingGridworld(args.num_envs, args.seed, args.gridworld_n_path, args.gridworld_epsilon, args.gamma)
    if args.env_id in MINATAR:
        return MinAtar(args.env_id, args.num_envs, args.seed)
    flags = args.reward_clip, atari_protocol(args), args.env_step, iteration, args.full_action_space, args.num_devices
    pool = partial(make_pool, args.env_id, args.num_envs, args.seed, *flags)
    half = args.num_envs // 2
    return Halves(pool(slice(half)), pool(slice(half, None))) if args.overlap_rollout else pool()
