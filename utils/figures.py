"""The style of figures, whatever the user's Matplotlib configuration (matplotlibrc) says."""

from contextlib import _GeneratorContextManager
from typing import Any


def own_style(style: dict[str, Any] | None = None) -> _GeneratorContextManager:
    """Return a context or decorator with Matplotlib's own defaults and `style`. Create and save a figure in the same context.

    Raises:
        KeyError: Matplotlib does not know an entry of `style`.
    """
    import matplotlib  # imported here: it is slow, and most runs draw nothing

    default = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    return matplotlib.rc_context(default | (style or {}))
