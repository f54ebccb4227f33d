"""Options of an environment as they are typed: `--env-option length=12 slippery=false`."""

import contextlib
import difflib
from collections.abc import Mapping
from typing import Any

WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class EnvError(ValueError):
    """An id, an option, or an environment of your own that does not work. The message is one line that says what to do."""


def read_options(typed: tuple[str, ...], known: Mapping[str, Any], env_id: str) -> dict[str, Any]:
    """Return the typed options, each with the type of its default.

    Args:
        typed: words of the form name=value.
        known: the defaults of the environment's options.
        env_id: for messages.

    Raises:
        EnvError: an option is not known, is given twice, or does not have the type of its default.
    """
    options = {}
    for word in typed:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise EnvError(f"--env-option {word}: must be name=value")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            has = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(known)) or 'none'}"
            raise EnvError(f"--env-option {word}: {env_id} has no such option; {has}")
        if name in options:
            raise EnvError(f"--env-option {word}: {name} is given twice; leave one out")
        try:
            options[name] = value_of(text, known[name])
        except ValueError as error:
            raise EnvError(f"--env-option {word}: {error}") from None
    return options


def value_of(text: str, like: Any) -> Any:
    """Return the value that a text means, with the type of `like`. Sequences are written with commas. If `like` is None, the
    text decides: true, false, none, an integer, another number, or else a string.

    Raises:
        ValueError: it has another type.
    """
    if like is None:
        words = {"true": True, "false": False, "none": None}
        if text.lower() in words:
            return words[text.lower()]
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text
    if isinstance(like, bool):
        if text.lower() not in WORDS:
            raise ValueError("must be true or false")
        return WORDS[text.lower()]
    if isinstance(like, int):
        try:
            return int(text.replace("_", ""))
        except ValueError:
            raise ValueError("must be an integer") from None
    if isinstance(like, float):
        try:
            return float(text)
        except ValueError:
            raise ValueError("must be a number") from None
    if isinstance(like, (tuple, list)):
        return type(like)(value_of(one, like[0] if like else "") for one in text.split(",") if one)
    return text
