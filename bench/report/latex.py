"""A suite's tables as LaTeX, to be taken into a paper with ``\\input``.

They need the packages booktabs and graphicx, and an engine or input encoding of UTF-8, which is
every LaTeX of today. A table too long for a page goes on in the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.errors import MembenchError
from bench.record import Record
from bench.report.cells import made_with, notes, table_title
from bench.report.grids import figures_grid, paper_grid
from bench.report.markup import LATEX
from bench.report.rows import Table, make_tables
from bench.report.scaling import compared_by_size, scaling_grid, scaling_series

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["latex_table", "latex_text"]

_HEAD = (
    "% Made by membench report. Do not edit: delete it and make it again.\n"
    "% Needs \\usepackage{booktabs,graphicx} and \\usepackage[T1]{fontenc}."
)
_LINES = 40  # of a table on one page


def latex_text(suite: str, records: Sequence[Record]) -> str:
    """Return the tables of a suite's records as LaTeX.

    Errors: MembenchError when there are no records.
    """
    if not records:
        raise MembenchError(f"no records to report on for {suite}: run membench run first")
    text = [_HEAD]
    for number, table in enumerate(make_tables(records), start=1):
        label = "".join(c if c.isalnum() else "-" for c in f"{suite}-{number}")
        text += _tables(table, label)
    return "\n\n".join(text) + "\n"


def _tables(table: Table, label: str) -> list[str]:
    title = LATEX.text(table_title(table))
    about = LATEX.text(" ".join([made_with(table) + ".", *notes(table)]))
    if compared_by_size(table):
        grid, left = scaling_grid(scaling_series(table), LATEX), 2
    else:
        grid, left = paper_grid(table, LATEX), 1
    return [
        *latex_table(grid, left, f"{title}. {about}", f"tab:{label}"),
        *latex_table(
            figures_grid(table, LATEX), 4, f"All figures of {title}.", f"tab:{label}-figures"
        ),
    ]


def latex_table(frame: pd.DataFrame, left: int, caption: str, label: str) -> list[str]:
    """Return a frame of LaTeX text as tables of booktabs, its first ``left`` columns left.

    ``caption`` is LaTeX text too. Each table is as wide as the text, or as it needs if less.
    """
    columns = "l" * min(left, len(frame.columns)) + "r" * max(0, len(frame.columns) - left)
    head = " & ".join(map(str, frame.columns))
    rows = [" & ".join(map(str, row)) + r" \\" for row in frame.itertuples(index=False)]
    found = []
    for begin in range(0, len(rows), _LINES):
        continued = " (continued)" if begin else ""
        # \maxwidth would need adjustbox: a box is measured instead, and only shrunk.
        found.append(
            "\n".join(
                [
                    r"\begin{table}[htbp]",
                    r"\centering",
                    rf"\caption{{{caption if not begin else LATEX.text(label)}{continued}}}",
                    *([] if begin else [rf"\label{{{label}}}"]),
                    r"\sbox0{\begin{tabular}{" + columns + "}",
                    r"\toprule",
                    head + r" \\",
                    r"\midrule",
                    *rows[begin : begin + _LINES],
                    r"\bottomrule",
                    r"\end{tabular}}",
                    r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
                    r"\end{table}",
                ]
            )
        )
    return found
