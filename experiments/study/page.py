"""Write a comparison as one self-contained HTML page, and as Markdown."""

from html import escape
from typing import NamedTuple

CSS = """
:root { color-scheme: light dark; --line: #8884; --warn: #dc2626; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
code, pre { font-size: .85rem; } pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line); border-radius: 6px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 1rem; }
.figures svg { width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin-bottom: .5rem; }
.legend i { display: inline-block; width: 1.6em; margin-right: .4em; vertical-align: middle; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.warn { color: var(--warn); font-weight: 600; }
"""


class Table(NamedTuple):
    """Rows of strings; the first row is the header."""

    rows: list[list[str]]

    def html(self) -> str:
        """Return the table as HTML, which scrolls sideways if it is too wide."""
        cells = lambda kind, row: "".join(f"<{kind}>{escape(text)}</{kind}>" for text in row)  # noqa: E731
        head, *body = self.rows
        rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in body)
        return f'<div class="table"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{rows}</tbody></table></div>'

    def markdown(self) -> str:
        """Return the table as Markdown."""
        line = lambda row: "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"  # noqa: E731
        head, *body = self.rows
        return "\n".join([line(head), line(["---"] * len(head)), *map(line, body)])


class Figures(NamedTuple):
    """Figures: separate SVGs for the HTML page, and one image with all for Markdown."""

    legend: str
    svgs: list[str]
    picture: str  # image file next to the Markdown file
    text: str


class Section(NamedTuple):
    """A heading, and the texts, tables and figures below it."""

    heading: str
    parts: list["str | Table | Figures"]


class Warned(str):
    """A text shown as a warning."""


class Code(str):
    """A shell command."""


def _html(part) -> str:
    if isinstance(part, Table):
        return part.html()
    if isinstance(part, Figures):
        svgs = "".join(f"<div>{svg}</div>" for svg in part.svgs)
        return f'<div class="legend">{part.legend}</div><div class="figures">{svgs}</div>'
    if isinstance(part, Code):
        return f"<pre>{escape(part)}</pre>"
    return f"<p{' class=warn' if isinstance(part, Warned) else ''}>{escape(part)}</p>"


def _markdown(part) -> str:
    if isinstance(part, Table):
        return part.markdown()
    if isinstance(part, Figures):
        return f"![{part.text}](<{part.picture}>)" if " " in part.picture else f"![{part.text}]({part.picture})"
    if isinstance(part, Code):
        return f"    {part}"
    return f"**{part}**" if isinstance(part, Warned) else part


def html(title: str, sections: list[Section]) -> str:
    """Return the comparison as an HTML page."""
    body = "".join(
        (f"<h2>{escape(section.heading)}</h2>" if section.heading else "") + "\n".join(map(_html, section.parts))
        for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def markdown(title: str, sections: list[Section]) -> str:
    """Return the comparison as Markdown."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.heading}"] * bool(section.heading) + [_markdown(part) for part in section.parts]
    return "\n\n".join(parts) + "\n"
