"""The search space of a tuner: which flags it varies, and over which values."""

import contextlib
import dataclasses
import io
import itertools
import math
import re
from typing import Any, get_args, get_origin, get_type_hints

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from envs.options import WORDS
from envs.registry import family, observes_images
from experiments.study.plan import RUNNERS, named
from utils.runs.flag_types import as_typed
from utils.runs.flags import UsageError, check_flags, parse_flags, require

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
INTERVAL = re.compile(rf"(log:)?({NUMBER}):({NUMBER})")
DIGITS = 3  # of a proposed number
MOST_CHECKED = 100  # numbers inside an interval of whole numbers that are checked before the search
Params = dict[str, Any]  # flag, as typed without dashes: its value
Space = dict[str, BaseDistribution]


def parse_space(searched: tuple[str, ...], args_type: type) -> Space:
    """Return the distribution of each searched flag.

    Args:
        searched: each `flag=LOW:HIGH` (uniform), `flag=log:LOW:HIGH` (uniform in the logarithm), or `flag=A,B,C` (choices). A
            choice of a flag that takes several values separates them by spaces, and may be empty.
        args_type: the class that declares the script's flags.

    Raises:
        UsageError: a flag does not exist, is set by the launcher, appears twice, or its values are not those of such a flag.
    """
    require(len(searched) > 0, "--search: name at least one flag, such as --search learning-rate=log:1e-4:1e-2")
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(args_type)}
    hints, space = get_type_hints(args_type), {}
    for text in searched:
        name, equals, values = text.partition("=")
        name, typed = name.removeprefix("--").replace("_", "-"), f"--search {text}"
        require(bool(equals), f"{typed}: has no values; write --search {name or 'flag'}=LOW:HIGH or {name or 'flag'}=A,B,C")
        require(name in fields, f"{typed}: the script has no flag --{name}; see its --help")
        require(name not in RUNNERS, f"{typed}: the tuner sets --{name}; use --env-ids, --seeds or --logdir")
        require(name not in space, f"{typed}: --{name} is searched twice; name it once")
        interval = INTERVAL.fullmatch(values)
        require(bool(interval) or ":" not in values, f"{typed}: {values} is no interval; write LOW:HIGH or log:LOW:HIGH")
        space[name] = (
            _interval(typed, hints[name.replace("-", "_")], *interval.groups()) if interval else _choices(typed, values)
        )
    return space


def _interval(typed: str, hint: Any, log: str | None, low: str, high: str) -> BaseDistribution:
    kinds = {kind for kind in (int, float) if kind in (hint, *get_args(hint))}
    require(len(kinds) > 0 and not takes_several(hint), f"{typed}: this flag takes no single number; list its values, A,B,C")
    kind = float if float in kinds else int
    try:
        ends = kind(low), kind(high)
    except ValueError:
        raise UsageError(f"{typed}: this flag takes whole numbers") from None
    require(ends[0] < ends[1], f"{typed}: the interval is empty; write the lower end first")
    require(log is None or ends[0] > 0, f"{typed}: a logarithmic interval begins above 0")
    return (FloatDistribution if kind is float else IntDistribution)(*ends, log=log is not None)


def _choices(typed: str, values: str) -> CategoricalDistribution:
    choices = values.split(",")
    require(len(choices) > 1, f"{typed}: has one value; separate several by commas, or set the flag after --")
    require(len(set(choices)) == len(choices), f"{typed}: has duplicates; remove them")
    return CategoricalDistribution(choices)


def rounded(params: Params, space: Space) -> Params:
    """Return the values with few digits, inside their intervals: the values that a command line shows and a trial uses. An
    interval has about a thousand of them, or for each power of ten if it is logarithmic."""

    def one(value: Any, of: BaseDistribution) -> Any:
        if not isinstance(of, FloatDistribution):
            return value
        if of.log:
            narrow = max(0, math.ceil(-math.log10(math.log10(of.high) - math.log10(of.low))))
            short = float(f"{value:.{DIGITS + narrow}g}")
        else:
            short = round(value, DIGITS - math.floor(math.log10(of.high - of.low)))
        return min(max(short, of.low), of.high)

    return {name: one(params[name], of) for name, of in space.items()}


def as_words(params: Params, args_type: type) -> list[str]:
    """Return the values as words of a command line."""
    hints, words = get_type_hints(args_type), []
    for name, value in params.items():
        several = takes_several(hints[name.replace("-", "_")])
        words += [f"--{name}", *value.split()] if several else [f"--{name}={value}"]
    return words


def takes_several(hint: Any) -> bool:
    """Return True if a flag of this type takes several values."""
    return any(get_origin(kind) in (tuple, list) for kind in (hint, *get_args(hint)))


def size(space: Space) -> float:
    """Return the number of different settings; infinite with an interval of numbers that are not whole."""
    number = 1.0
    for of in space.values():
        whole = of.high - of.low + 1 if isinstance(of, IntDistribution) else math.inf
        number *= len(of.choices) if isinstance(of, CategoricalDistribution) else whole
    return number


def default_params(space: Space, args_type: type, env_ids: tuple[str, ...], flags: list[str]) -> Params | None:
    """Return the values that the flags have without a search; None if they differ between the environments or lie outside the
    search space."""
    params: Params = {}
    for env_id in env_ids:
        args = parse_flags(args_type, [f"--env-id={env_id}", *flags])
        for name, of in space.items():
            value = getattr(args, name.replace("-", "_"))
            if isinstance(of, CategoricalDistribution):
                value = next((choice for choice in of.choices if _same(choice, value)), None)
            elif value is None or isinstance(value, str) or not of.low <= value <= of.high:
                value = None
            if value is None or params.setdefault(name, value) != value:
                return None
    return params


def _same(choice: str, value: Any) -> bool:
    """Return True if the choice, a word of the command line, is that value of a flag."""
    if isinstance(value, tuple):
        return len(choice.split()) == len(value) and all(map(_same, choice.split(), value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(choice) == value
    if isinstance(value, bool):
        return WORDS.get(choice.lower()) == value
    return choice.lower() == str(value).lower()


def check_space(space: Space, args_type: type, env_ids: tuple[str, ...], flags: list[str]) -> None:
    """Check the ends of each interval and each choice, in all pairs, as the script itself would check them.

    Args:
        space: the search space.
        args_type: the class that declares the script's flags.
        env_ids: the environments of the search.
        flags: the flags of every run, as typed.

    Raises:
        UsageError: the script refuses a value, or does not read the flag together with the others.
    """
    for name in space:
        require(name not in named(flags), f"--{name}: is searched, so every trial sets it; leave it out after --")
    names = {name: name.replace("-", "_") for name in space}
    # the environments of a family share their defaults, and those that observe images the flags that have an effect
    alike = {(env_id if family(env_id) == "own" else family(env_id), observes_images(env_id)): env_id for env_id in env_ids}
    for env_id in alike.values():
        usual = parse_flags(args_type, [f"--env-id={env_id}", *flags])
        values = {name: [_parsed(name, end, args_type, env_id, flags) for end in ends(of)] for name, of in space.items()}
        first = dataclasses.replace(usual, **{names[name]: parsed[0] for name, parsed in values.items()})
        inside = {
            name: range(of.low + 1, of.high)[:MOST_CHECKED] for name, of in space.items() if isinstance(of, IntDistribution)
        }
        singles = [{name: value} for name, whole in inside.items() for value in whole]
        pairs = itertools.combinations(space, min(2, len(space)))
        chosen = (
            dict(zip(pair, v, strict=True)) for pair in pairs for v in itertools.product(*(values[name] for name in pair))
        )
        for params in (*singles, *chosen):
            if said := refusal(dataclasses.replace(first, **{names[name]: value for name, value in params.items()})):
                typed = " and ".join(as_typed(name, value) for name, value in params.items())
                remedy = "; list the values instead of an interval, A,B,C" if params in singles else ""
                raise UsageError(f"--search: {env_id} refuses {typed}: {said}{remedy}")


def refusal(args: Any) -> str:
    """Return why the script refuses these flags in a search, whose runs are named and resumed; "" if it accepts them."""
    try:
        check_flags(dataclasses.replace(args, resume="auto", run_name="trial"))
    except UsageError as error:
        return str(error)
    return ""


def ends(distribution: BaseDistribution) -> tuple[Any, ...]:
    """Return all choices, or the ends of the interval."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return distribution.low, distribution.high


def _parsed(name: str, value: Any, args_type: type, env_id: str, flags: list[str]) -> Any:
    """Return the value as the script parses it."""
    words, said = [f"--env-id={env_id}", *flags, *as_words({name: value}, args_type)], io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return getattr(parse_flags(args_type, words), name.replace("-", "_"))
    except SystemExit:
        raise UsageError(
            f"--search {name}: {value or repr(value)} is not a value of --{name}; see the script's --help"
        ) from None
