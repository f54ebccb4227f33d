"""The flags of a run as they are stored, compared with those that would continue it, and made into flags again."""

import dataclasses
import json
from typing import Any, get_type_hints

from utils.runs.flags import MAY_CHANGE, UsageError, annotations_of, as_typed, make_args

SCHEDULED = ("anneal_lr", "anneal_heads_lr")  # flags that make something depend on how much of the run is left

RENAMED = {"enforce_neighbourhood": "enforce_neighborhood"}  # flags of older runs
# what runs did before there was a flag for it, where that is not the default of the flag
BEFORE = {"transition_layers": (), "value_aware_coef": 0.0, "real_value_coef": 0.0, "bounded_dreams": False}


def to_store(args: Any) -> dict[str, Any]:
    """All flags, as JSON has them."""
    # a path may hold what no encoding has
    plain = {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in vars(args).items()}
    return json.loads(json.dumps(plain))


def from_store(args_type: type, stored: dict[str, Any]) -> Any:
    """The flags that `to_store` stored; what was declared since is as it was before, or has its environment's default.

    Raises:
        UsageError: a stored flag is not declared.
    """
    fields = {field.name: field for field in dataclasses.fields(args_type)}
    stored = {RENAMED.get(name, name): value for name, value in stored.items()}
    unknown = [name for name in stored if name not in fields]
    if unknown:
        raise UsageError(f"the run was made with --{unknown[0].replace('_', '-')}, which there is no more: use its commit")
    stored = {name: value for name, value in BEFORE.items() if name in fields} | stored
    several = {name for name, field in fields.items() if isinstance(field.default, tuple)}
    return make_args(args_type, **{name: tuple(value) if name in several else value for name, value in stored.items()})


def check_continued(args: Any, stored: dict[str, Any], name: str) -> None:
    """Checks that a run made with the stored flags may go on with others. More steps it may make.

    Raises:
        UsageError: it may not; the message names each flag that differs.
    """
    args_type = type(args)
    before, now = vars(from_store(args_type, stored)), vars(args)
    hints = get_type_hints(args_type, include_extras=True)
    free = {name for name, hint in hints.items() if MAY_CHANGE in annotations_of(hint)}
    if not (before["track"] and now["track"]):
        free |= {name for name in now if name.startswith("wandb_")}
    if now["total_timesteps"] > before["total_timesteps"]:
        free.add("total_timesteps")
    differing = [name for name in now if name not in free and before[name] != now[name]]
    if differing:
        said = "; ".join(f"{as_typed(flag, now[flag])} (it was {before[flag]})" for flag in differing)
        raise UsageError(
            f"{name} cannot go on with other flags: {said}; leave these as they were, or choose another --run-name"
        )


def stretched(args: Any, stored: dict[str, Any], step: int) -> str | None:
    """What a larger --total-timesteps does to a run that is at `step`, in a line; None where it is no larger."""
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
    return said + f"what {' and '.join(schedules)} lowers now reaches its end there: it goes back from {done:.0%} to {less:.0%}"
