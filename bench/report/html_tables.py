"""A frame of HTML text as a table that reads without a script, and sorts with one."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["html_table", "sort_value"]

_FIGURE = re.compile(r"(-?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?: ?(B|KiB|MiB|GiB|TiB|%|s))?(?=$|[*,])")
_BEFORE = re.compile(r".*needs |&gt; |&lt; |~ ?")  # "does not fit ...: needs 41.6 GiB"
_TAG = re.compile(r"<[^>]*>")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def html_table(frame: pd.DataFrame, left: int, caption: str, *, sortable: bool = True) -> str:
    """Return a frame, whose names and cells are HTML, as a table; ``caption`` is plain text.

    The first ``left`` columns are aligned left.
    """
    names = list(map(str, frame.columns))
    head = "".join(
        f'<th scope="col"{_left(column < left)}>{name}</th>' for column, name in enumerate(names)
    )
    rows = [
        "<tr>" + "".join(_cell(str(text), c < left) for c, text in enumerate(row)) + "</tr>"
        for row in frame.itertuples(index=False)
    ]
    kind = ' class="sortable"' if sortable and len(rows) > 1 else ""
    return (
        f'<div class="scroll"><table{kind}><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _left(left: bool) -> str:
    return ' class="left"' if left else ""


def _cell(text: str, left: bool) -> str:
    value = None if left else sort_value(text)
    data = "" if value is None else f' data-value="{value:.12g}"'
    return f"<td{_left(left)}{data}>{text}</td>"


def sort_value(text: str) -> float | None:
    """Return the figure that a cell sorts by, as the bytes of ``1.5 GiB``; None for other text."""
    plain = _TAG.sub("", text)
    before = _BEFORE.match(plain)
    found = _FIGURE.match(plain, before.end() if before else 0)
    if found is None:
        return None
    return float(found[1].replace(",", "")) * _UNITS.get(found[2] or "", 1)
