"""A table as a picture: a bar per variant and shape, stacked of the parts of its figure.

The only module that imports matplotlib, and never its global state, so no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Literal

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.report.cells import section_title, size_text, table_title
from bench.report.rows import Row, Table
from bench.report.style import (
    CAPACITY_COLOUR,
    HATCHES,
    NEEDS_COLOUR,
    PAPER_COLOUR,
    PART_COLOURS,
    RC,
    TEXT_COLOUR,
)
from bench.units import GIB

__all__ = ["bar_parts", "plot_table"]

_WIDTH_IN = 9.0
_ROW_IN = 0.25
_AROUND_IN = 1.5  # title, axis and legend
_BAR_HEIGHT = 0.72
_DPI = 150
_PAPER_MARKERS = {"=": "D", "~": "D", ">": ">"}
_METADATA: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}


def plot_table(table: Table, kind: Literal["png", "svg"]) -> bytes:
    """Return the picture of a table as the bytes of a file; equal tables give equal bytes."""
    with matplotlib.rc_context(RC):
        figure = draw_table(table)
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=_DPI, metadata=_METADATA[kind])
    return file.getvalue()


def draw_table(table: Table) -> Figure:
    """Return the figure: sections from top to bottom, one GiB axis for all."""
    places = list(_places(table))
    height = _AROUND_IN + _ROW_IN * (places[-1][0] + 1)
    figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, item in places:
        if isinstance(item, Row):
            _draw_row(axes, y, item)
        else:
            axes.text(0.004, y, item, transform=axes.get_yaxis_transform(), va="center", weight="bold")
    rows = [(y, item) for y, item in places if isinstance(item, Row)]
    axes.set_yticks([y for y, _ in rows], [row.record.variant for _, row in rows])
    _finish(axes, table, places[-1][0] + 0.6)
    figure.legend(handles=_legend(table), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _places(table: Table) -> Iterator[tuple[float, Row | str]]:
    """Yield (y, a section's title or a row) from the top down, in units of a row."""
    y = 0.0
    for section in table.sections:
        yield y, section_title(section, table)
        for row in section.rows:
            y += 1.0
            yield y, row
        y += 1.3


def bar_parts(row: Row) -> list[tuple[str, int]]:
    """Return what a row's bar is stacked of, (part, bytes) from the axis on.

    Where the parts are not all known, or the case does not fit, the figure is one bar but for
    the context; nothing where there is no figure.
    """
    if row.figure_bytes is None:
        return []
    parts = row.record.parts
    context = parts.context_bytes or 0
    if row.record.status == "oom":
        return [("needs", row.figure_bytes - context), ("context", context)]
    if parts.tensors_bytes is None or parts.allocator_bytes is None:
        return [("tensors", row.figure_bytes - context), ("context", context)]
    stacked = [
        ("tensors", parts.tensors_bytes),
        ("workspace", parts.workspace_bytes or 0),
        ("allocator", parts.allocator_bytes),
        ("context", context),
    ]
    return [(name, size) for name, size in stacked if size > 0]


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
        )
        end += width
    text_from = end
    if row.paper is not None:
        paper = row.paper.bytes / GIB
        marker = _PAPER_MARKERS[row.paper.relation]
        axes.plot([paper], [y], marker, color=PAPER_COLOUR, markersize=4, zorder=4)
        text_from = max(end, paper)
    axes.annotate(
        _bar_text(row),
        (text_from, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=CAPACITY_COLOUR if row.record.status != "ok" else TEXT_COLOUR,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        zorder=5,
    )


def _bar_text(row: Row) -> str:
    if row.record.status == "oom":
        needs = f": needs {size_text(row.needs_bytes)}" if row.needs_bytes is not None else ""
        return f"does not fit{needs}"
    return size_text(row.used_bytes) if row.record.status == "ok" else row.record.status


def _finish(axes: Axes, table: Table, bottom: float) -> None:
    axes.set_ylim(bottom, -0.7)
    capacity = _card_gib(table)
    ends = [size / GIB for row in table.rows for size in [row.figure_bytes] if size]
    ends += [row.paper.bytes / GIB for row in table.rows if row.paper]
    right = max([*ends, *([capacity] if capacity and ends and max(ends) > capacity / 4 else [])] or [1])
    axes.set_xlim(0, right * 1.28)  # room for the text behind the longest bar
    if capacity is not None and capacity < right * 1.28:
        axes.axvline(capacity, color=CAPACITY_COLOUR, linestyle="--", linewidth=1.2, zorder=3)
    axes.set_xlabel("GPU memory of the process, GiB")
    axes.set_title(table_title(table), loc="left", weight="bold", fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def _card_gib(table: Table) -> float | None:
    held = next((row.card_bytes for row in table.rows if row.card_bytes is not None), None)
    return None if held is None else held / GIB


def _legend(table: Table) -> list[Artist]:
    """Return an entry for each thing that the picture shows, and for nothing else."""
    hatch = HATCHES[table.first.evidence]
    shown = {part for row in table.rows for part, _ in bar_parts(row)}
    names = {**PART_COLOURS, "needs": NEEDS_COLOUR}
    labels = {"needs": "needed, does not fit", "allocator": "allocator's cache"}
    handles: list[Artist] = [
        Patch(facecolor=colour, edgecolor="white", hatch=hatch, label=labels.get(part, part))
        for part, colour in names.items()
        if part in shown
    ]
    for marker, label in (("D", "the paper's figure"), (">", "the paper: more than")):
        if any(row.paper and _PAPER_MARKERS[row.paper.relation] == marker for row in table.rows):
            handles.append(
                Line2D([], [], marker=marker, color=PAPER_COLOUR, linestyle="", markersize=4, label=label)
            )
    capacity = _card_gib(table)
    if capacity is not None:
        handles.append(
            Line2D([], [], color=CAPACITY_COLOUR, linestyle="--", label=f"the card: {capacity:.1f} GiB")
        )
    return handles
