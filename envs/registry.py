"""All environments, by id."""

import difflib
import re
from functools import cache, partial
from typing import Any, Literal

import numpy as np

from envs import own
from envs.atari import PLAIN, STOCHASTIC, AtariProtocol, FramePool
from envs.confounding_gridworld import ENV_ID as GRIDWORLD
from envs.confounding_gridworld import ConfoundingGridworld, build_model
from envs.minatar import GAMES as MINATAR
from envs.minatar import MinAtar
from envs.observations import is_image
from envs.options import EnvError
from envs.pool import MODULES, Pool, can_be_drawn, env_seeds, module_of, pool_ids, pool_rewards, pool_spec
from envs.protocol import Env, own_seed
from envs.scan import Halves

IN_JAX = ("minatar", "gridworld", "own")  # families that are not envpool's
UNDIVIDED = {"overlap_rollout": False, "num_devices": 1}  # flags for playing instead of training


@cache
def env_ids() -> tuple[str, ...]:
    """Return the ids that `--env-id` knows, besides import paths (`envs.own`). Of envpool's, some turn out not to be supported
    when their specification is read (`pool_spec`)."""
    return *pool_ids(), *MINATAR, GRIDWORLD


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
    found = [known for known in found if known in MINATAR or known == GRIDWORLD or not refusal(known)]
    atari = [known for known in found if family(known) in ("atari", "minatar")]
    return (atari or found)[:3]


def family(env_id: str) -> str | None:
    """Return the family of an environment: minatar, gridworld, own (an import path), or that of envpool: atari, classic
    (classic control and toy text), procgen, minigrid, craftax, box2d, highway, gfootball and others. None: unknown id."""
    for kind, ids in (("minatar", MINATAR), ("gridworld", (GRIDWORLD,))):
        if env_id in ids:
            return kind
    if own.is_path(env_id):
        return "own"
    module = module_of(env_id) if env_id else None  # last, because importing envpool takes a second
    return module and MODULES.get(module, module)


def file_name(env_id: str) -> str:
    """Return the id as part of a file name: without the folder of a path, slashes and colons."""
    return re.sub(r"[^\w.+-]+", "-", own.short(env_id).replace(".py:", ":"))


def is_pooled(env_id: str) -> bool:
    """Return True for an environment of envpool."""
    return family(env_id) not in (None, *IN_JAX)


def refusal(env_id: str, options: tuple[str, ...] = ()) -> str | None:
    """Return why scripts cannot train on a known environment with these options, or None if they can."""
    kind = family(env_id)
    try:
        if kind == "own":
            own.load(env_id, options)
        elif kind in IN_JAX:
            flags = " (see the flags that begin with --gridworld)" if kind == "gridworld" else ""
            return f"--env-option {options[0]}: {env_id} has no options{flags}; leave it out" if options else None
        else:
            pool_spec(env_id, ())  # first without options: what they cannot mend is not their mistake
            pool_spec(env_id, options)
    except EnvError as error:
        return str(error)
    return None


def reward_range(env_id: str, options: tuple[str, ...] = ()) -> tuple[float, float]:
    """Return the range of one step's reward, infinite if unknown. For Atari, --reward-clip decides."""
    if env_id in MINATAR:
        return MINATAR[env_id].reward_range
    if own.is_path(env_id):
        return own.make(env_id, 1, 0, options).reward_range
    return pool_rewards(env_id) if is_pooled(env_id) else (-np.inf, np.inf)


def pays_beyond_one(env_id: str, options: tuple[str, ...] = ()) -> bool:
    """Return True if a reward of the environment can leave [-1, 1]. Return False for Atari, where --reward-clip decides."""
    low, high = reward_range(env_id, options)
    return family(env_id) != "atari" and not -1.0 <= low <= high <= 1.0


def observes_images(env_id: str, options: tuple[str, ...] = ()) -> bool:
    """Return True if observations are images, so that `--encoder` has a choice. One of your own may observe anything."""
    if not is_pooled(env_id):
        return env_id not in MINATAR
    spec = pool_spec(env_id, options)
    return spec.obs_parts is None and is_image(spec.obs_spec.shape) or any(p.kind == "pixels" for p in spec.obs_parts or ())


def can_render(env_id: str, options: tuple[str, ...] = ()) -> bool:
    """Return True if videos can be made of an environment."""
    if own.is_path(env_id):
        return hasattr(own.make(env_id, 1, 0, options), "render")
    return not is_pooled(env_id) or can_be_drawn(env_id)


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
    if own.is_path(args.env_id):
        seed = own_seed(args.seed, iteration) if iteration else args.seed
        return own.make(args.env_id, args.num_envs, seed, args.env_option)
    flags = args.reward_clip, atari_protocol(args), args.env_step, iteration, args.full_action_space, args.num_devices
    pool = partial(make_pool, args.env_id, args.num_envs, args.seed, *flags, typed=args.env_option)
    half = args.num_envs // 2
    return Halves(pool(part=slice(half)), pool(part=slice(half, None))) if args.overlap_rollout else pool()


def make_pool(
    env_id: str,
    num_envs: int,
    seed: int,
    reward_clip: bool = True,
    protocol: AtariProtocol = PLAIN,
    stepping: Literal["auto", "xla", "callback"] = "auto",
    iteration: int = 0,
    full_action_space: bool = False,
    num_devices: int = 1,
    part: slice = slice(None),
    typed: tuple[str, ...] = (),
) -> Pool:
    """Create a pool of envpool's environments.

    Args:
        env_id: an id of envpool.
        num_envs: number of environments that step together.
        seed: seed of the whole pool; see `env_seeds`.
        reward_clip: train on the sign of Atari's rewards.
        protocol: sticky actions and no-ops (Atari only).
        stepping: see `Pool`.
        iteration: the run's iteration when these environments start; see `env_seeds` and `EpisodeStats.to_count`.
        full_action_space: use all 18 Atari actions, not only those with an effect in the game.
        num_devices: see `Pool`.
        part: the slice of the environments to create.
        typed: options, each as name=value.

    Raises:
        EnvError: the id is unknown or not supported, or see `Pool`.
        RuntimeError: see `Pool`.
    """
    if not is_pooled(env_id):
        raise EnvError(f"env_id {env_id!r}: no environment of envpool; see docs/environments.md for the valid ids")
    if said := refusal(env_id, typed):
        raise EnvError(said)
    start = env_id, env_seeds(seed, num_envs, iteration)[part]
    how = stepping, iteration > 0, num_devices, typed
    if family(env_id) != "atari":
        return Pool(*start, pool_rewards(env_id), *how)
    reward_range = (-1.0, 1.0) if reward_clip else (-np.inf, np.inf)
    options = protocol._asdict() | {"episodic_life": True, "reward_clip": reward_clip, "full_action_space": full_action_space}
    return FramePool(*start, reward_range, *how, **options)
