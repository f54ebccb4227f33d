"""Annotations of a flag: its valid range, the flags it depends on, its defaults, and whether a resumed run may change it.

    gae_lambda: Share = 0.95
    num_classes: Annotated[int, at_least(2), Needs(latent="categorical")] = 32
    save_every: Annotated[NotNegative, MAY_CHANGE] = 900.0
    ent_coef: Annotated[NotNegative, Default(atari=0.1)] = 0.01

`utils.runs.flags` reads them: `check_flags` checks all flags of a run, and `make_args` creates flags with their defaults.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

LARGEST = 2**31 - 1  # JAX integers have 32 bits


class Range(NamedTuple):
    """The values that a flag may have. If a flag takes several values, each of them is checked."""

    holds: Callable[[Any], bool]
    remedy: str
    limit: int = LARGEST  # largest integer


class Needs:
    """The values of other flags that a flag depends on. Without them it has no effect, and setting it is an error.

    Args:
        text: describes the condition in messages; by default made from `flags`.
        when: predicate of all flags, for conditions that `flags` cannot express.
        flags: the required value of each flag, or a tuple of allowed values.
    """

    def __init__(self, text: str | None = None, when: Callable[[Any], bool] | None = None, **flags: Any):
        self.flags = {name: value if isinstance(value, tuple) else (value,) for name, value in flags.items()}
        self.when = when or (lambda args: all(getattr(args, name) in values for name, values in self.flags.items()))
        self.text = text or " ".join(as_typed(name, *values) for name, values in self.flags.items())


class Default:
    """The default of a flag in these families of environments (`envs.registry.family`); overrides the field's default."""

    def __init__(self, **families: Any):
        self.families = families


BY_FAMILY = "its defaults in families of environments are those that all scripts share (`utils.runs.family_defaults`)"
MAY_CHANGE = "a resumed run may change it: results are the same up to rounding"


def as_typed(name: str, *values: Any) -> str:
    """Format a flag as on the command line; alternative values are joined with "or"."""
    name = name.replace("_", "-")
    if isinstance(values[0], tuple):
        return " ".join(map(str, (f"--{name}", *(values[0] or ("(none)",)))))
    if isinstance(values[0], bool):
        return f"--{'' if values[0] else 'no-'}{name}"
    return f"--{name} {' or '.join(map(str, values))}"


def at_least(n: int) -> Range:
    """Return the range of integers from n on."""
    return Range(lambda x: x >= n, f"must be at least {n}")


ANY = Range(lambda x: True, "")
Count = Annotated[int, at_least(1)]
Positive = Annotated[float, Range(lambda x: x > 0, "must be positive")]
NotNegative = Annotated[float, Range(lambda x: x >= 0, "must be 0 or more")]
Share = Annotated[float, Range(lambda x: 0 <= x <= 1, "must lie in [0, 1]")]
InsideUnit = Annotated[float, Range(lambda x: 0 < x < 1, "must lie between 0 and 1")]
Sizes = Annotated[tuple[int, ...], Range(lambda x: x > 0, "sizes must be positive")]
Seed = Annotated[int, Range(lambda x: x >= 0, "must be 0 or more", 2**32 - 1)]  # larger seeds would be truncated to 32 bits
Steps = Annotated[int, Range(lambda x: x >= 1, "must be at least 1", 2**53)]
Switch = Annotated[bool, MAY_CHANGE]
