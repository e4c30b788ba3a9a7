"""Figures of several panels: how many there are of what, which look alike everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.report.cells import table_title
from bench.report.rows import Section, Table
from bench.report.style import GRID_COLOUR

__all__ = ["chosen_sections", "finish_panel", "panel_figure", "shortened"]

_PANEL_IN = (3.0, 2.15)
_AROUND_IN = 0.9  # title, axis and legend
_LETTERS_AN_INCH = 11  # of a bold title


def chosen_sections(sections: Sequence[Section], most: int) -> list[Section]:
    """Return at most so many sections, in their order: the largest input of each network first."""

    def voxels(section: Section) -> int:
        return math.prod(section.first.shape) * section.first.batch_size

    ranked: list[tuple[int, int, int]] = []  # (rank within its network, -voxels, place)
    seen: dict[tuple[str, str], int] = {}
    for place in sorted(range(len(sections)), key=lambda p: -voxels(sections[p])):
        first = sections[place].first
        key = (first.network, first.mode)
        seen[key] = seen.get(key, 0) + 1
        ranked.append((seen[key], -voxels(sections[place]), place))
    kept = {place for *_, place in sorted(ranked)[:most]}
    return [section for place, section in enumerate(sections) if place in kept]


def panel_figure(
    table: Table, what: str, count: int, columns: int, panel_in: tuple[float, float] = _PANEL_IN
) -> tuple[Figure, list[Axes]]:
    """Return a titled figure with ``count`` panels, ``columns`` side by side."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = (max(panel_in[0] * columns, 6.0), panel_in[1] * rows + _AROUND_IN)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in panels[count:]:
        axes.set_axis_off()
    lines = wrap(shortened(table_title(table), 300), int(size[0] * _LETTERS_AN_INCH))
    title = "\n".join([what, *lines])
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=9)
    return figure, panels[:count]


def shortened(text: str, most: int = 40) -> str:
    """Return text of at most so many letters, its middle left out where it has more."""
    if len(text) <= most:
        return text
    end = (most - 3) // 2
    return f"{text[: most - 3 - end]}...{text[-end:]}"


def finish_panel(axes: Axes, title: str) -> None:
    """Give a panel its title and its grid."""
    axes.set_title(
        "\n".join(shortened(line) for line in title.split("\n")),
        loc="left",
        fontsize=7.5,
        weight="bold",
    )
    axes.grid(color=GRID_COLOUR, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
