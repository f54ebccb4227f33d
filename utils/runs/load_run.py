"""Load the results of a run in a notebook or a script:

    from utils.runs.load_run import load_run
    params, agent, env = load_run("runs/my-run")

The scripts and their imports must be on Python's path, as they are in a notebook started in the scripts' folder.
"""

import dataclasses
import importlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from envs.options import EnvError
from envs.protocol import Env
from envs.registry import UNDIVIDED, make_env
from utils.runs.checkpoints import Checkpoints, Damaged, Saved, find, load
from utils.runs.flags import UsageError, require
from utils.runs.folder import CHECKPOINTS, MODEL
from utils.runs.outputs import expand
from utils.runs.stored_flags import from_store


def find_params(path: Path) -> Saved:
    """Find the final model or the last checkpoint of a run, whichever is later. Damaged ones are skipped with a warning.
    `path` may also be the folder of one model or checkpoint.

    Raises:
        UsageError: there is no intact model or checkpoint.
    """
    found, of_run = [], not (path / "arrays").exists()
    for place in [path / MODEL, *reversed(Checkpoints(path / CHECKPOINTS, 0).steps().values())] if of_run else [path]:
        try:
            found.append(find(place))
        except Damaged as error:
            if place.exists():
                warnings.warn(f"{place} is damaged ({error}); skipped", stacklevel=3)
            continue
        if place.parent.name == CHECKPOINTS:
            break
    if not found:
        raise UsageError(f"{path}: holds neither a model nor a checkpoint that is intact")
    return max(found, key=lambda saved: saved.progress["step"])


class LoadedRun(NamedTuple):
    """A loaded run: the script's `Params` and `Agent`, the run's environments (restarted), its flags, and the metadata of the
    model or checkpoint (`name`, `algorithm`, `script`, `seed`, `step` and others)."""

    params: Any
    agent: Any
    env: Env
    args: Any
    progress: dict[str, Any]


def load_run(path: str | Path, **flags: Any) -> tuple[Any, Any, Env]:
    """Return a run's parameters, networks and environments. Arguments and errors are those of `read_run`.

    z = agent.encoder.apply(params.encoder, obs)
    logits, value = agent.actor_critic.apply(params.actor_critic, z, obs)
    """
    return read_run(path, **flags)[:3]


def read_run(path: str | Path, **flags: Any) -> LoadedRun:
    """Load a run.

    Args:
        path: a run folder, for its final model or last checkpoint, whichever is later; or the folder of one of them.
        flags: override the run's flags, such as `num_envs=1` or `seed=100`. One device is used, whatever the run used.

    Raises:
        UsageError: nothing there can be loaded, or this code cannot load it.
    """
    require(not jax.config.jax_enable_x64, f"{path}: its parameters have 32 bits; load them with jax_enable_x64 off")
    saved = find_params(expand(path))
    try:
        script = importlib.import_module(saved.progress["script"])
    except ModuleNotFoundError as error:
        if error.name != saved.progress["script"]:
            raise UsageError(f"{path}: its script needs {error.name}, which is not installed") from None
        raise UsageError(f"{path}: its script {saved.progress['script']}.py is not on Python's path; add its folder") from None
    args = dataclasses.replace(from_store(script.Args, saved.progress["flags"]), **UNDIVIDED | flags)
    try:
        env = make_env(args)
    except (ImportError, EnvError) as error:  # an extra, or the file of an environment, is missing
        raise UsageError(f"{path}: {error}") from None
    agent = script.make_agent(args, env.num_actions, env.obs_parts)
    obs = jnp.zeros((1, *env.obs_spec.shape), env.obs_spec.dtype)
    params = jax.eval_shape(lambda key: script.init_params(key, agent, obs), jax.random.key(0))
    try:
        return LoadedRun(load(saved, {"params": params})["params"], agent, env, args, saved.progress)
    except Damaged as error:
        raise UsageError(f"{saved.path}: cannot be read ({error}); choose another checkpoint") from None
