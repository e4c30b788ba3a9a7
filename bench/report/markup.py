"""How text stands in markdown, in HTML and in LaTeX: as it is, whatever marks it holds."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["HTML", "LATEX", "MARKDOWN", "Markup", "escaped"]


@dataclass(frozen=True, slots=True)
class Markup:
    """A way to write text: ``text`` escapes it, ``strong`` too; ``lines`` takes what is written."""

    text: Callable[[str], str]
    strong: Callable[[str], str]
    lines: Callable[[str, str], str]


def escaped(text: str) -> str:
    """Return text that stands in markdown, and in a cell of a table, as it is."""
    one_line = " ".join(text.split())
    for mark in "\\|*`[]":
        one_line = one_line.replace(mark, f"\\{mark}")
    return one_line.replace("<", "&lt;").replace(">", "&gt;")


def _html_text(text: str) -> str:
    return html.escape(" ".join(text.split()))


_LATEX = {mark: f"\\{mark}" for mark in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\textquotedbl}",
    "²": r"\textsuperscript{2}",
    "³": r"\textsuperscript{3}",
    "[": "{[}",  # behind a line's end it would be a length
    "]": "{]}",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in " ".join(text.split()))


MARKDOWN = Markup(
    text=escaped,
    strong=lambda text: f"**{escaped(text)}**",
    lines=lambda one, other: f"{one}<br>{other}",
)
HTML = Markup(
    text=_html_text,
    strong=lambda text: f"<strong>{_html_text(text)}</strong>",
    lines=lambda one, other: f"{one}<br><small>{other}</small>",
)
LATEX = Markup(
    text=_latex_text,
    strong=lambda text: rf"\textbf{{{_latex_text(text)}}}",
    lines=lambda one, other: rf"\shortstack[r]{{{one}\\{other}}}",
)
