"""Bytes a voxel against input size as a picture: a panel for each network, a line for each variant.

Both axes are logarithmic, so what a card holds, bytes a voxel x voxels, is a falling straight line:
a network fits a card where it stays below that card's line.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.report.cells import table_title
from bench.report.rows import Table
from bench.report.scaling import scaling_series, side_text
from bench.report.style import CAPACITY_COLOUR, LINE_STYLES, MARKERS, RC, SERIES_COLOURS
from bench.scaling import CARD_GIB, Series
from bench.units import GIB

__all__ = ["draw_scaling", "plot_scaling"]

_PANEL_IN = (4.1, 3.1)
_COLUMNS = 2
_DPI = 150
_CARD_TEXT: dict[str, Any] = {"color": CAPACITY_COLOUR, "fontsize": 7}
_METADATA: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None}}


def plot_scaling(table: Table, kind: Literal["png", "svg"]) -> bytes:
    """Return the picture of a table as the bytes of a file; equal tables give equal bytes."""
    with matplotlib.rc_context(RC):
        figure = draw_scaling(table)
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=_DPI, metadata=_METADATA[kind])
    return file.getvalue()


def draw_scaling(table: Table) -> Figure:
    """Return the figure: a panel for each network, with the lines of cards behind its own."""
    panels: dict[str, list[Series]] = {}
    for series in scaling_series(table):
        panels.setdefault(series.record.network, []).append(series)
    rows = math.ceil(len(panels) / _COLUMNS)
    width, height = _PANEL_IN[0] * _COLUMNS, _PANEL_IN[1] * rows + 0.6
    figure = Figure(figsize=(width + 1.6 * _COLUMNS, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, (network, series_of_one) in zip(grid, panels.items(), strict=False):
        _draw_panel(axes, network, series_of_one)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(table_title(table), x=0.01, ha="left", weight="bold", fontsize=10)
    return figure


def _draw_panel(axes: Axes, network: str, series: Sequence[Series]) -> None:
    colours, markers = _looks(series)
    for one, colour, marker in zip(series, colours, markers, strict=True):
        axes.plot(
            [point.voxels for point in one.points],
            [point.bytes_per_voxel for point in one.points],
            LINE_STYLES[one.record.evidence],
            color=colour,
            marker=marker,
            markersize=4,
            markerfacecolor=colour if one.record.evidence == "measured" else "white",
            linewidth=1.1,
            label=one.record.variant,
            zorder=3,
        )
    _finish(axes, network, series)


def _looks(series: Sequence[Series]) -> tuple[list[str], list[str]]:
    """Return a colour for each kind of network and a marker for each technique.

    Where all are one kind of network, the colours tell the techniques apart too.
    """
    kinds = [json.dumps(s.record.definition.get("network_options"), sort_keys=True) for s in series]
    ways = [json.dumps(s.record.definition.get("techniques"), sort_keys=True) for s in series]
    of_colour = ways if len(set(kinds)) == 1 else kinds
    return _numbered(of_colour, SERIES_COLOURS), _numbered(ways, MARKERS)


def _numbered(keys: Sequence[str], looks: Sequence[str]) -> list[str]:
    order = list(dict.fromkeys(keys))
    return [looks[order.index(key) % len(looks)] for key in keys]


def _finish(axes: Axes, network: str, series: Sequence[Series]) -> None:
    points = [point for one in series for point in one.points]
    voxels = sorted({point.voxels: point.shape for point in points}.items())
    heights = [point.bytes_per_voxel for point in points]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(voxels[0][0] / 1.4, voxels[-1][0] * 1.4)
    axes.set_ylim(min(heights) / 1.5, max(heights) * 1.5)
    _draw_cards(axes)
    batch = series[0].record.batch_size
    title = network if batch == 1 else f"{network}, batch {batch}"
    axes.set_title(title, loc="left", weight="bold", fontsize=9, pad=22)
    axes.set_ylabel("bytes a voxel" if batch == 1 else "bytes a voxel of the batch")
    axes.xaxis.set_major_locator(FixedLocator([count for count, _ in voxels]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([side_text(shape) for _, shape in voxels], rotation=35, ha="right")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#EEEEEE", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.06, 0.5), frameon=False, fontsize=7)


def _draw_cards(axes: Axes) -> None:
    """Draw the line of each card that crosses the panel, named where it enters or leaves it."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    drawn = 0
    for card in CARD_GIB:
        held = card * GIB
        if not bottom * left < held < top * right:
            continue
        ends = [max(left, held / top), min(right, held / bottom)]
        axes.plot(
            ends, [held / x for x in ends], "-", color=CAPACITY_COLOUR, linewidth=0.7, alpha=0.6
        )
        if held / top >= left:
            above = (0, 9 if drawn % 2 else 1)  # points; in two rows, or neighbours would touch
            axes.annotate(
                f"{card}",
                (held / top, top),
                xytext=above,
                textcoords="offset points",
                va="bottom",
                ha="center",
                **_CARD_TEXT,
            )
        elif held / right >= bottom:
            axes.text(right, held / right, f" {card}", **_CARD_TEXT, va="center", ha="left")
        drawn += 1
    if drawn:
        axes.plot([], [], "-", color=CAPACITY_COLOUR, linewidth=0.7, label="a card's GiB")
