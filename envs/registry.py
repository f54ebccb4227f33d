"""All environments, by id."""

import difflib
import re
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


def _plain(env_id: str) -> str:
    """Return the game in an id of this or another library, without what the libraries add to its name."""
    return re.sub(r".*[/:]|-ram|noframeskip|deterministic|minatar|-?v\d+$|[-_ ]", "", env_id.lower())


def ids_like(env_id: str) -> list[str]:
    """Return the valid ids, at most three, that a wrong id may mean: one with a typing error, or from another library, such as
    PongNoFrameskip-v4, ALE/Pong-v5, MinAtar/Breakout-v1 or space_invaders."""
    names: dict[str, list[str]] = {}
    for known in env_ids():
        names.setdefault(_plain(known), []).append(known)
    close = difflib.get_close_matches(_plain(env_id), names, n=3, cutoff=0.6)
    close = close[:1] if _plain(env_id) in names else close
    found = [known for name in close for known in names[name]]
    small, numbered = "minatar" in env_id.lower(), re.search(r"-v\d+$", env_id.lower())
    if small or numbered:  # a game that exists twice
        found = [known for known in found if (known in MINATAR) == small] or found
    return found[:3]


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
