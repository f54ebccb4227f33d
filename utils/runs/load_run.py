"""What a run left behind, for a notebook or a script:

    from utils.runs.load_run import load_run
    params, agent, env = load_run("runs/my-run")

The scripts, and what they import, have to be on Python's path: a notebook that is started beside them finds them.
"""

import dataclasses
import importlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from envs.protocol import Env
from envs.registry import UNDIVIDED, make_env
from utils.runs.checkpoints import Checkpoints, Damaged, Saved, find, load
from utils.runs.flags import UsageError
from utils.runs.folder import CHECKPOINTS, MODEL
from utils.runs.stored_flags import from_store


def find_params(path: Path) -> Saved:
    """The final model of a run, or its last checkpoint, whichever is later; one that is damaged is left out, with a warning.
    Of the folder of a model or of a checkpoint, that.

    Raises:
        UsageError: there is nothing that is whole.
    """
    found, of_run = [], not (path / "arrays").exists()
    for place in [path / MODEL, *reversed(Checkpoints(path / CHECKPOINTS, 0).steps().values())] if of_run else [path]:
        try:
            found.append(find(place))
        except Damaged as error:
            if place.exists():
                warnings.warn(f"{place} is damaged ({error})", stacklevel=3)
            continue
        if place.parent.name == CHECKPOINTS:
            break
    if not found:
        raise UsageError(f"{path}: holds neither a model nor a checkpoint that is whole")
    return max(found, key=lambda saved: saved.progress["step"])


class LoadedRun(NamedTuple):
    """What a run left behind: the script's `Params` and `Agent`, environments as it had them, started anew, the flags, and what
    the model or checkpoint says of itself (`name`, `algorithm`, `script`, `seed`, `step` and others)."""

    params: Any
    agent: Any
    env: Env
    args: Any
    progress: dict[str, Any]


def load_run(path: str | Path, **flags: Any) -> tuple[Any, Any, Env]:
    """Parameters, networks and environments of a run: the first three of `read_run`, whose arguments and errors it has.

    z = agent.encoder.apply(params.encoder, obs)
    logits, value = agent.actor_critic.apply(params.actor_critic, z, obs)
    """
    return read_run(path, **flags)[:3]


def read_run(path: str | Path, **flags: Any) -> LoadedRun:
    """All there is of a run.

    Args:
        path: of a run's folder: its final model, or if it has none its last checkpoint; or of one checkpoint.
        flags: in the place of the run's own, such as `num_envs=1` or `seed=100`. One device is used, whatever the run had.

    Raises:
        UsageError: nothing can be loaded from there, or not by this code.
    """
    saved = find_params(Path(path).expanduser())
    try:
        script = importlib.import_module(saved.progress["script"])
    except ModuleNotFoundError:
        raise UsageError(f"{path}: was made by {saved.progress['script']}.py, which is not on Python's path") from None
    args = dataclasses.replace(from_store(script.Args, saved.progress["flags"]), **UNDIVIDED | flags)
    try:
        env = make_env(args)
    except ImportError as error:  # an extra
        raise UsageError(f"{path}: {error}") from None
    agent = script.make_agent(args, env.num_actions)
    obs = jnp.zeros((1, *env.obs_spec.shape), env.obs_spec.dtype)
    params = jax.eval_shape(lambda key: script.init_params(key, agent, obs), jax.random.key(0))
    try:
        return LoadedRun(load(saved, {"params": params})["params"], agent, env, args, saved.progress)
    except Damaged as error:
        raise UsageError(f"{saved.path}: cannot be read ({error}); name another checkpoint") from None
