"""The table that ``membench run`` prints: a block of rows for each shape, as a paper's columns.

It takes the width it is given: on a narrow terminal the less telling columns are left out, and no
row is folded. Predicted figures are yellow and said to be predicted in the title and, where there
is room, in every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from bench.record import Record
from bench.report.cells import cells, made_with, notes, section_title, table_title
from bench.report.rows import Row, Table, make_tables

__all__ = ["results_table"]

_GAP = 2

# Left to right; the number is the order in which columns are given up, 0 is never given up.
_COLUMNS = {
    "variant": 0,
    "precision": 2,
    "parameters": 5,
    "GPU memory": 0,
    "needs": 7,
    "ratio": 0,
    "paper": 9,
    "of paper": 8,
    "allocated": 6,
    "reserved": 4,
    "requested": 1,
    "host": 4,
    "recomputation": 12,
    "step time": 10,
    "voxels/s": 11,
    "evidence": 3,
}
_SAYS_NOTHING = {"recomputation": ("-", "1.00")}  # in all rows; of other columns, a dash
_LEFT = ("variant", "precision", "evidence")
_COLOURS = {"ok": "", "oom": "red", "failed": "bold red", "timeout": "bold red", "skipped": "dim"}


def results_table(records: Sequence[Record]) -> RenderableType:
    """Return the records as a table for a rich console, one for each way they were made."""
    if not records:
        return Text("no records")
    parts: list[RenderableType] = []
    for table in make_tables(records):
        parts += [Text(), _ResultsTable(table)]
    return Group(*parts[1:])


@dataclass(frozen=True, slots=True)
class _ResultsTable:
    """A table that chooses its columns by the width it is rendered at."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        texts = {id(row): cells(row) for row in self.table.rows}
        widths = _fitting(_widths(list(texts.values())), options.max_width)
        yield _title(self.table)
        yield Text(made_with(self.table), style="dim")
        yield Text()
        yield _line({name: name for name in widths}, widths, {}, "bold")
        for section in self.table.sections:
            yield Text(section_title(section, self.table), style="bold cyan")
            for row in section.rows:
                yield _line(texts[id(row)], widths, _styles(row), "")
        yield Text()
        yield from (Text(note, style="dim") for note in notes(self.table))


def _title(table: Table) -> Text:
    title = Text(table_title(table), style="bold")
    if table.first.evidence == "predicted":
        title.highlight_words([table.evidence], "bold yellow")
    return title


def _widths(rows: Sequence[dict[str, str]]) -> dict[str, int]:
    """Return column -> width, without the columns that say nothing in any row."""
    return {
        name: max(len(name), *(len(row[name]) for row in rows))
        for name in _COLUMNS
        if any(row[name] not in _SAYS_NOTHING.get(name, ("-",)) for row in rows)
    }


def _fitting(widths: dict[str, int], max_width: int) -> dict[str, int]:
    """Give up columns, least telling first, until the rest fits."""
    kept = dict(widths)
    spare = sorted((name for name in widths if _COLUMNS[name]), key=_COLUMNS.__getitem__)
    # Two columns for the indent of the rows under their shape.
    while spare and sum(kept.values()) + _GAP * len(kept) > max_width:
        del kept[spare.pop(0)]
    return kept


def _line(
    texts: dict[str, str], widths: dict[str, int], styles: dict[str, str], style: str
) -> Text:
    line = Text(style=style, no_wrap=True, overflow="ignore")
    for name, width in widths.items():
        padded = texts[name].ljust(width) if name in _LEFT else texts[name].rjust(width)
        line.append(" " * _GAP).append(padded, style=styles.get(name, ""))
    line.rstrip()
    return line


def _styles(row: Row) -> dict[str, str]:
    """Return column -> colour: yellow for what is predicted, red for what does not fit."""
    figure = _COLOURS[row.record.status]
    shade = "yellow" if row.record.evidence == "predicted" else "green"
    return {
        "GPU memory": figure or shade,
        "needs": "red" if row.record.status == "oom" else shade,
        "allocated": shade,
        "reserved": shade,
        "requested": shade,
        "paper": "dim",
        "of paper": "red" if row.agreement == "disagrees" else "",
        "evidence": "dim",
    }
