"""Memory against input size as a picture: a panel for each network, the cards' sizes as lines.

Both axes are logarithmic: a step that takes fixed bytes and so many for each voxel bends from flat
to straight, and cards of 8 to 80 GiB stand on one picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.report.cells import size_text
from bench.report.panels import finish_panel, panel_figure, shortened
from bench.report.picture_files import tip
from bench.report.rows import Table
from bench.report.scaling import side_text
from bench.report.style import (
    CAPACITY_COLOUR,
    LINE_STYLES,
    PAGE_COLOUR,
    series_look,
)
from bench.scaling import CARD_GIB, Series, make_series
from bench.units import GIB

__all__ = ["MOST_PANELS", "draw_sizes", "size_series"]

MOST_PANELS = 8
_MOST_LINES = 14  # in one panel; more could not be told apart
_CLOSEST = 0.07  # of the axis, from one size that is named to the next
_COLUMNS = 2
_FAR = 4.0  # a card so many times the largest point would squeeze the lines


def size_series(table: Table) -> dict[str, list[Series]]:
    """Return panel title -> the series of two sizes or more that are drawn in it."""
    panels: dict[str, list[Series]] = {}
    for series in make_series(row.record for row in table.rows):
        if len(series.points) > 1:
            record = series.record
            title = record.network + ", prediction" * (record.mode == "infer")
            panels.setdefault(title, []).append(series)
    return {title: panels[title][:_MOST_LINES] for title in list(panels)[:MOST_PANELS]}


def draw_sizes(table: Table) -> Figure:
    """Return the figure; ``size_series`` must not be empty."""
    panels = size_series(table)
    what = "Memory against input size"
    figure, axes = panel_figure(table, what, len(panels), _COLUMNS, (5.2, 3.0))
    for panel, (title, series) in zip(axes, panels.items(), strict=True):
        _draw_panel(panel, title, series)
    return figure


def _draw_panel(axes: Axes, title: str, series: Sequence[Series]) -> None:
    for number, one in enumerate(series):
        colour, marker = series_look(number)
        voxels = [point.voxels for point in one.points]
        sizes = [point.bytes / GIB for point in one.points]
        axes.plot(
            voxels,
            sizes,
            LINE_STYLES[one.record.evidence],
            color=colour,
            marker=marker,
            markersize=4,
            markerfacecolor=colour if one.record.evidence == "measured" else PAGE_COLOUR,
            linewidth=1.1,
            label=_label(one),
            gid=tip(f"{_label(one)}: {_range_text(one)}"),
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    points = [point for one in series for point in one.points]
    _scale(axes, [p.voxels for p in points], [p.bytes / GIB for p in points])
    shown = _ticks({point.voxels: side_text(point.shape) for point in points})
    axes.xaxis.set_major_locator(FixedLocator([count for count, _ in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([text for _, text in shown], rotation=30, ha="right")
    finish_panel(axes, title)
    axes.set_ylabel("GPU memory needed, GiB", fontsize=8)
    axes.legend(loc="center left", bbox_to_anchor=(1.14, 0.5), frameon=False, fontsize=6.5)


def _ticks(shapes: Mapping[int, str]) -> list[tuple[int, str]]:
    """Return (voxels, shape) of the sizes that can be named side by side, the largest first."""
    descending = sorted(shapes, reverse=True)
    least = _CLOSEST * math.log(descending[0] / descending[-1] + 1)
    shown = descending[:1]
    for voxels in descending[1:]:
        if math.log(shown[-1] / voxels) >= least:
            shown.append(voxels)
    return [(voxels, shapes[voxels]) for voxels in shown]


def _label(series: Series) -> str:
    record = series.record
    batch = f", batch {record.batch_size}" if record.batch_size > 1 else ""
    precision = "" if record.precision == "fp32" else f", {record.precision}"
    return f"{shortened(record.variant)}{batch}{precision}"


def _range_text(series: Series) -> str:
    first, last = series.points[0], series.points[-1]
    return (
        f"{size_text(first.bytes)} at {side_text(first.shape)}, "
        f"{size_text(last.bytes)} at {side_text(last.shape)}"
    )


def _scale(axes: Axes, voxels: Sequence[int], gib: Sequence[float]) -> None:
    """Give room for the points and the next larger card; draw the cards between."""
    bottom, top = min(gib) / 1.3, max(gib) * 1.2
    larger = [card for card in CARD_GIB if max(gib) <= card < _FAR * max(gib)]
    if larger:
        top = max(top, larger[0] * 1.1)
    axes.set_xlim(min(voxels) / 1.2, max(voxels) * 1.2)
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for card in CARD_GIB:
        if bottom < card < top:
            axes.axhline(card, color=CAPACITY_COLOUR, linewidth=0.7, zorder=1)
            axes.annotate(
                f"{card} GiB",
                (1.01, card),
                xycoords=axes.get_yaxis_transform(),
                va="center",
                fontsize=6.5,
                color=CAPACITY_COLOUR,
                annotation_clip=False,
            )
