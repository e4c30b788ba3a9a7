"""A table as a picture: a bar per variant and shape, stacked of the parts of its figure.

Never matplotlib's global state, so that no display is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.report.cells import section_title, size_text, table_title
from bench.report.panels import shortened
from bench.report.parts import bar_parts
from bench.report.picture_files import picture_bytes, tip
from bench.report.rows import Row, Table
from bench.report.style import (
    CAPACITY_COLOUR,
    GRID_COLOUR,
    HATCHES,
    NEEDS_COLOUR,
    PAPER_COLOUR,
    PART_COLOURS,
    PART_LABELS,
    TEXT_COLOUR,
)
from bench.units import GIB

__all__ = ["bar_parts", "draw_table", "plot_table"]

_WIDTH_IN = 9.0
_ROW_IN = 0.25
_AROUND_IN = 1.5  # title, axis and a legend of two lines
_LEGEND_LINE_IN = 0.18
_LEGEND_COLUMNS = 4
_MOST_ROWS = 120  # a longer picture is no picture any more; the tables have the others
_LETTERS = 72  # of a title's line, above the bars alone
_UNFITTING = 0.55  # opacity of a case that does not fit the card
_BAR_HEIGHT = 0.72
_FAR = 4.0  # a card this many times the longest bar would squeeze the bars: not drawn
_FAR_OUT = 3.0  # a case that does not fit by more than this runs to the edge: its needs are written
_PAPER_MARKERS = {"=": "D", "~": "D", ">": ">"}


def plot_table(table: Table, kind: Literal["png", "svg"]) -> bytes:
    """Return the picture of a table as the bytes of a file; equal tables give equal bytes."""
    return picture_bytes(lambda: draw_table(table), kind)


def draw_table(table: Table) -> Figure:
    """Return the figure: sections from top to bottom, one GiB axis for all."""
    places = list(_places(table))
    legend = _legend(table)
    lines = max(0, -(-len(legend) // _LEGEND_COLUMNS) - 2)
    height = _AROUND_IN + _ROW_IN * (places[-1][0] + 1) + _LEGEND_LINE_IN * lines
    figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, item in places:
        if isinstance(item, Row):
            _draw_row(axes, y, item)
        else:
            axes.text(
                0.004, y, item, transform=axes.get_yaxis_transform(), va="center", weight="bold"
            )
    rows = [(y, item) for y, item in places if isinstance(item, Row)]
    axes.set_yticks([y for y, _ in rows], [shortened(row.record.variant) for _, row in rows])
    _finish(axes, table, places[-1][0] + 0.6)
    if legend:
        figure.legend(
            handles=legend, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False
        )
    return figure


def _places(table: Table) -> Iterator[tuple[float, Row | str]]:
    """Yield (y, a section's title or a row) from the top down, in units of a row."""
    y, drawn, cases = 0.0, 0, len(table.rows)
    for section in table.sections:
        yield y, shortened(section_title(section, table), 90)
        for row in section.rows:
            y += 1.0
            if drawn == _MOST_ROWS:
                yield y, f"and {cases - drawn:,} more cases, which the tables have"
                return
            yield y, row
            drawn += 1
        y += 1.3


def _draw_row(axes: Axes, y: float, row: Row) -> None:
    end = 0.0
    for part, size in bar_parts(row):
        width = size / GIB
        axes.barh(
            y,
            width,
            _BAR_HEIGHT,
            left=end,
            color=PART_COLOURS.get(part, NEEDS_COLOUR),
            edgecolor="white",
            linewidth=0.4,
            hatch=HATCHES[row.record.evidence],
            alpha=_UNFITTING if row.record.status == "oom" and part != "needs" else None,
            gid=tip(f"{row.record.variant}, {PART_LABELS.get(part, part)}: {size_text(size)}"),
        )
        end += width
    if row.paper is not None:
        paper = row.paper.bytes / GIB
        marker = _PAPER_MARKERS[row.paper.relation]
        axes.plot([paper], [y], marker, color=PAPER_COLOUR, markersize=4, zorder=4)
    axes.text(
        1.01,  # right of the axes, where no bar, marker or line can run through it
        y,
        _bar_text(row),
        transform=axes.get_yaxis_transform(),
        va="center",
        color=TEXT_COLOUR if row.record.status == "ok" else CAPACITY_COLOUR,
    )


def _bar_text(row: Row) -> str:
    if row.record.status == "oom":
        needs = f": needs {size_text(row.needs_bytes)}" if row.needs_bytes is not None else ""
        return f"does not fit{needs}"
    return size_text(row.used_bytes) if row.record.status == "ok" else row.record.status


def _finish(axes: Axes, table: Table, bottom: float) -> None:
    axes.set_ylim(bottom, -0.7)
    right, card = _longest_gib(table), _drawn_card_bytes(table)
    if card is not None:
        right = max(right, card / GIB)
        axes.axvline(card / GIB, color=CAPACITY_COLOUR, linestyle="--", linewidth=1.2, zorder=3)
        right = min(right, _FAR_OUT * max(card / GIB, _longest_gib(table, fitting=True)))
    axes.set_xlim(0, right * 1.03)
    axes.set_xlabel("GPU memory of the process, GiB")
    title = "\n".join(wrap(shortened(table_title(table), 200), _LETTERS))
    axes.set_title(title, loc="left", weight="bold", fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=GRID_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)


def _longest_gib(table: Table, *, fitting: bool = False) -> float:
    """Return where the longest bar or marker ends; ``fitting``: of the cases that fit alone."""
    rows = [row for row in table.rows if row.record.status == "ok" or not fitting]
    ends = [row.figure_bytes for row in rows if row.figure_bytes]
    ends += [row.paper.bytes for row in table.rows if row.paper]
    return max(ends, default=GIB) / GIB


def _drawn_card_bytes(table: Table) -> int | None:
    """Return the card's memory, None where it is not known or too far off to be drawn."""
    held = next((row.card_bytes for row in table.rows if row.card_bytes is not None), None)
    return None if held is None or held / GIB > _FAR * _longest_gib(table) else held


def _legend(table: Table) -> list[Artist]:
    """Return an entry for each thing that the picture shows, and for nothing else."""
    hatch = HATCHES[table.first.evidence]
    shown = {part for row in table.rows for part, _ in bar_parts(row)}
    names = {**PART_COLOURS, "needs": NEEDS_COLOUR}
    labels = dict(PART_LABELS)
    if "workspace" not in shown:  # a measured allocator cannot tell the two apart
        labels["tensors"] = "tensors and workspaces"
    handles: list[Artist] = [
        Patch(facecolor=colour, edgecolor="white", hatch=hatch, label=labels.get(part, part))
        for part, colour in names.items()
        if part in shown
    ]
    for marker, label in (("D", "the paper's figure"), (">", "the paper: more than")):
        if any(row.paper and _PAPER_MARKERS[row.paper.relation] == marker for row in table.rows):
            handles.append(
                Line2D(
                    [],
                    [],
                    marker=marker,
                    color=PAPER_COLOUR,
                    linestyle="",
                    markersize=4,
                    label=label,
                )
            )
    card = _drawn_card_bytes(table)
    if card is not None:
        text = f"the card: {size_text(card)}"
        handles.append(Line2D([], [], color=CAPACITY_COLOUR, linestyle="--", label=text))
    return handles
