"""Environments of your own, by import path: `--env-id my_envs.py:Corridor` or `--env-id my_package.envs:Corridor`.

The name stands for a class or function that takes `num_envs`, `seed`, and options (`--env-option`), and returns an `Env`.
docs/add_an_environment.md is the guide.
"""

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from envs.observations import unreadable
from envs.options import EnvError, read_options
from envs.protocol import Env, Timestep


def is_path(env_id: str) -> bool:
    """Return True if the id is an import path: a .py file or a module, a colon, and a name."""
    return re.fullmatch(r"(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*", env_id) is not None


def absolute(env_id: str) -> str:
    """Return the id with the full path of its file, for processes in another folder; other ids unchanged."""
    place, _, name = env_id.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if is_path(env_id) and place.endswith(".py") else env_id


def short(env_id: str) -> str:
    """Return the id without the folder of its file, for tables and figures; other ids unchanged."""
    return Path(env_id).name if is_path(env_id) else env_id


def load(env_id: str, options: tuple[str, ...] = ()) -> tuple[Callable, dict[str, Any]]:
    """Return the class or function that an import path names, and the values of the options.

    Raises:
        EnvError: there is no such file, module or name; importing it fails; or it does not take these options.
    """
    place, _, name = env_id.rpartition(":")
    module = _import(env_id, place)
    if not callable(getattr(module, name, None)):
        own = [n for n, x in vars(module).items() if callable(x) and getattr(x, "__module__", "") == module.__name__]
        has = f"it has {', '.join(own)}" if own else "it defines no class or function"
        raise EnvError(f"--env-id {env_id}: {place} has no class or function {name}; {has}")
    make = getattr(module, name)
    parameters = inspect.signature(make).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for needed in ("num_envs", "seed"):
        if needed not in parameters and not takes_any:
            raise EnvError(f"--env-id {env_id}: {name} must take num_envs and seed; add {needed}")
    return make, read_options(options, _defaults(parameters, env_id, options), env_id)


def _defaults(parameters: Mapping[str, inspect.Parameter], env_id: str, options: tuple[str, ...]) -> dict[str, Any]:
    """Return a value of each option's type: its default or, without one, of its annotation. None if neither tells the type."""
    known, given = {}, {word.partition("=")[0] for word in options}
    for name, p in parameters.items():
        if name in ("self", "num_envs", "seed") or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        if p.default is not p.empty:
            known[name] = p.default
        else:
            text = getattr(p.annotation, "__name__", p.annotation)  # of a type, or a string already
            known[name] = {"bool": False, "int": 0, "float": 0.0, "str": ""}.get(text) if isinstance(text, str) else None
            if name not in given:
                raise EnvError(f"--env-id {env_id}: needs --env-option {name}=...")
    return known


def _import(env_id: str, place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise EnvError(f"--env-id {env_id}: {path} does not exist; check the path")
        return _from_file(path)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise EnvError(f"--env-id {env_id}: there is no module {error.name}; check its name, or install it") from None
        raise EnvError(f"--env-id {env_id}: {place} needs the module {error.name}; install it") from None
    except EnvError:
        raise
    except Exception as error:
        raise EnvError(f"--env-id {env_id}: importing {place} fails with {_where(error, place)}") from None


def _where(error: Exception, place: str) -> str:
    """Return an error and the line that raised it: the last one in the file or module `place`, if there is one."""
    lines = traceback.extract_tb(error.__traceback__)
    stem = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    own = [line for line in lines if Path(line.filename).stem == stem]
    line = (own or lines)[-1]
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first} ({line.filename}, line {line.lineno})"


@cache
def _from_file(path: Path) -> ModuleType:
    """Import a file, which may import what lies beside it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # files of the same name may be used together
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def source(env_id: str) -> Path | None:
    """Return the file of an import path; None for other ids, and for a module without a file.

    Raises:
        EnvError: it cannot be imported.
    """
    file = getattr(_import(env_id, env_id.rpartition(":")[0]), "__file__", None) if is_path(env_id) else None
    return Path(file) if file else None


def make(env_id: str, num_envs: int, seed: int, options: tuple[str, ...] = ()) -> Env:
    """Create an environment of your own, and check that it returns what scripts rely on.

    Raises:
        EnvError: see `load` and `check`.
    """
    make_env, values = load(env_id, options)
    place, _, name = env_id.rpartition(":")
    try:
        env = make_env(num_envs=num_envs, seed=seed, **values)
    except EnvError:
        raise
    except Exception as error:
        raise EnvError(f"--env-id {env_id}: creating {name} fails with {_where(error, place)}") from None
    check(env, env_id, num_envs)
    return env


def check(env: Any, env_id: str, num_envs: int) -> None:
    """Check the attributes of an environment, and the shapes and dtypes that `reset` and `step` return.

    Raises:
        EnvError: something is missing or wrong. The message says what is expected.
    """
    if not isinstance(env, Env):
        raise EnvError(f"--env-id {env_id}: returned {type(env).__name__}, but must return an envs.protocol.Env")
    for name in ("num_envs", "num_actions", "obs_spec"):
        if not hasattr(env, name):
            raise EnvError(f"--env-id {env_id}: has no attribute {name}; set it in __init__")
    if env.num_envs != num_envs:
        raise EnvError(f"--env-id {env_id}: has {env.num_envs} environments, but was asked for {num_envs}")
    what, place = "reset", env_id.rpartition(":")[0]
    try:
        state, obs = jax.eval_shape(env.reset)
        what = "step"
        new, after = jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((num_envs,), jnp.int32))
    except Exception as error:
        raise EnvError(f"--env-id {env_id}: {what} fails with {_where(error, place)}") from None
    said = f"--env-id {env_id}: step returns {type(after).__name__}, but must return a state and an envs.protocol.Timestep"
    if not isinstance(after, Timestep):
        raise EnvError(said)
    arrays_of = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    if jax.tree.structure(state) != jax.tree.structure(new) or arrays_of(state) != arrays_of(new):
        raise EnvError(f"--env-id {env_id}: the state that step returns has other arrays than the one that reset returns")
    if env.obs_parts is None and (said := unreadable(env.obs_spec.shape)):
        raise EnvError(f"--env-id {env_id}: {said}")
    expected = {"obs": (env.obs_spec.shape, env.obs_spec.dtype), "reward": ((), jnp.float32)}
    expected |= {name: ((), jnp.bool_) for name in ("terminated", "truncated", "valid")}
    for where, arrays in (("reset", {"obs": obs}), ("step", after._asdict())):
        for name in expected.keys() & arrays.keys():
            shape, dtype = expected[name]
            wanted, found = jax.ShapeDtypeStruct((num_envs, *shape), dtype), arrays[name]
            if (wanted.shape, wanted.dtype) != (getattr(found, "shape", None), getattr(found, "dtype", None)):
                raise EnvError(f"--env-id {env_id}: {name} of {where} is {_said(found)}, but must be {_said(wanted)}")


def _said(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__
