"""Store the flags of a run, load them, and compare them with the flags of a process that resumes the run."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, get_type_hints

from utils.runs.flag_types import MAY_CHANGE, as_typed
from utils.runs.flags import UsageError, annotations_of, defaults, make_args

LONGEST = 120  # characters of flags in the name of a run; file systems allow 255 in all
SCHEDULED = ("anneal_lr", "anneal_heads_lr")  # flags whose schedules span the whole run

RENAMED = {"enforce_neighbourhood": "enforce_neighborhood"}  # flags of older runs and their names today
# values for runs older than the flag, if its default changes their results
BEFORE = {"transition_layers": (), "value_aware_coef": 0.0, "real_value_coef": 0.0, "bounded_dreams": False}


def to_store(args: Any) -> dict[str, Any]:
    """Return all flags in JSON types."""
    # a path may contain characters that cannot be encoded
    plain = {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in vars(args).items()}
    return json.loads(json.dumps(plain))


def renewed(stored: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return stored flags under their names of today, those that are known in that order. Of the flags in `BEFORE`, the known
    ones that are missing are added."""
    found = {RENAMED.get(name, name): value for name, value in stored.items()}
    found = {name: value for name, value in BEFORE.items() if name in known} | found
    return {name: found[name] for name in known if name in found} | found


def from_store(args_type: type, stored: dict[str, Any]) -> Any:
    """Return the flags that `to_store` stored. Newer flags get their value in `BEFORE`, or their default.

    Raises:
        UsageError: a stored flag is no longer declared.
    """
    fields = {field.name: field for field in dataclasses.fields(args_type)}
    stored = renewed(stored, fields)
    unknown = [name for name in stored if name not in fields]
    if unknown:
        raise UsageError(f"the run was made with --{unknown[0].replace('_', '-')}, which was removed; use the run's commit")
    several = {name for name, field in fields.items() if isinstance(field.default, tuple)}
    return make_args(args_type, **{name: tuple(value) if name in several else value for name, value in stored.items()})


def may_change(args_type: type) -> set[str]:
    """Return the flags that a resumed run may change."""
    hints = get_type_hints(args_type, include_extras=True)
    return {name for name, hint in hints.items() if MAY_CHANGE in annotations_of(hint)}


def no_settings(args_type: type) -> set[str]:
    """Return the flags that are no settings of an algorithm: a resumed run may change them, or they are environment or seed."""
    return may_change(args_type) | {"env_id", "seed"}


def typed_settings(flags: dict[str, Any], args_type: type, default: dict[str, Any] | None) -> list[str]:
    """Return the flags that affect results, as on the command line.

    Args:
        flags: flags of a run, also as `to_store` returns them.
        args_type: declares which flags affect results.
        default: flags with these values are left out, and so are flags without a default. None: keep all.
    """
    without = no_settings(args_type)
    settings = {k: v for k, v in flags.items() if k not in without and not k.startswith("wandb_")}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return [as_typed(k, v) for k, v in settings.items() if default is None or (k in default and v != default[k])]


def changed_flags(args: Any) -> list[str]:
    """Return the flags that affect results and differ from the environment's defaults, as on the command line."""
    return typed_settings(vars(args), type(args), defaults(type(args), args.env_id))


def slug(flags: list[str]) -> str:
    """Return the flags as part of a file name. Long text is truncated, and a digest keeps it unique."""
    text = re.sub(r"[^A-Za-z0-9.+-]+", "-", " ".join(flags).replace("_", "-")).strip("-")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_continued(args: Any, stored: dict[str, Any], name: str, remedy: str = "choose another --run-name") -> None:
    """Check that a run made with the stored flags may be resumed with `args`. A larger --total-timesteps is allowed.
    `remedy` is what to do for a new run.

    Raises:
        UsageError: it may not be resumed; the message names each flag that differs.
    """
    args_type = type(args)
    before, now = vars(from_store(args_type, stored)), vars(args)
    free = may_change(args_type)
    if not (before["track"] and now["track"]):
        free |= {name for name in now if name.startswith("wandb_")}
    if now["total_timesteps"] > before["total_timesteps"]:
        free.add("total_timesteps")
    differing = [name for name in now if name not in free and before[name] != now[name]]
    if differing:
        said = "; ".join(f"{as_typed(flag, now[flag])} (was {before[flag]})" for flag in differing)
        raise UsageError(f"{name} cannot be resumed with other flags: {said}; keep the old values, or {remedy}")


def stretched(args: Any, stored: dict[str, Any], step: int) -> str | None:
    """Return a line on what a larger --total-timesteps changes in a run at `step`; None if it is not larger."""
    before = stored["total_timesteps"]
    if args.total_timesteps <= before:
        return None
    said = f"--total-timesteps {args.total_timesteps:,} instead of {before:,}: "
    schedules = [f"--{name.replace('_', '-')}" for name in SCHEDULED if getattr(args, name, False)]
    if getattr(args, "progressive", "none") != "none":
        schedules.append(f"--progressive {args.progressive}")
    if not schedules:
        return said + "nothing is annealed, so nothing else changes"
    done, less = step / before, step / args.total_timesteps
    return said + f"the schedule of {' and '.join(schedules)} is stretched; its progress drops from {done:.0%} to {less:.0%}"
