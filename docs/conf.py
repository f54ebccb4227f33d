"""Sphinx configuration of the documentation: uv run --group docs sphinx-build -W docs build/docs"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project = "Deep SPI in JAX"
author = copyright = "The Deep SPI in JAX authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"{project} {release}"
html_theme_options = {"navigation_with_keys": True}
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"  # the notebook is committed with its output; a slow test runs it
copybutton_prompt_text = "$ "
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes are in the docstrings, and jaxtyping's annotations are long
autodoc_default_options = {"members": True, "show-inheritance": False}


def docstring_to_rst(app, what, name, obj, options, lines):
    """Docstrings are plain text: quote code, escape what reStructuredText would read as markup, and mark indented blocks."""
    indent = lambda line: len(line) - len(line.lstrip())  # noqa: E731
    text, literal, level = [], False, 0
    for i, line in enumerate(lines):
        if literal and line.strip() and indent(line) <= level:
            literal = False
        if not literal:
            parts = line.split("`")
            parts[::2] = [part.replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|") for part in parts[::2]]
            parts[2::2] = [f"\\ {part}" if part[:1].isalnum() else part for part in parts[2::2]]  # `FrameState`s
            line = "``".join(parts) if len(parts) % 2 else line
            after = next((later for later in lines[i + 1 :] if later.strip()), "")
            if line.strip() and i + 1 < len(lines) and not lines[i + 1].strip() and indent(after) > indent(line):
                literal, level = True, indent(line)
                line = line.rstrip(":") + "::"
        text.append(line)
    lines[:] = text


def skip_fields(app, what, name, obj, skip, options):
    """The fields of a NamedTuple have no docstrings of their own."""
    return True if type(obj).__name__ == "_tuplegetter" else skip


def setup(app):
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=400)
