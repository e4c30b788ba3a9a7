"""Memory over the step as a picture: a panel for each case, what is held stacked by category."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.report.cells import short_title, size_text
from bench.report.panels import chosen_sections, finish_panel, panel_figure
from bench.report.parts import category_part
from bench.report.rows import Row, Section, Table
from bench.report.style import (
    CAPACITY_COLOUR,
    HATCHES,
    PAGE_COLOUR,
    PART_COLOURS,
    PART_LABELS,
    TEXT_COLOUR,
)
from bench.timeline import Timeline
from bench.units import GIB

__all__ = ["draw_timelines", "timeline_rows"]

MOST_PANELS = 12
_COLUMNS = 3
# A phase's width on the axis. Events are no time: an optimizer has more of them than a forward.
_WIDTHS = {"model": 0.7, "forward": 1.1, "backward": 1.5, "optimizer": 1.1}
_FAR = 4.0  # a card this many times the highest peak would flatten the panels: not drawn


def timeline_rows(table: Table) -> list[tuple[Row, Timeline, str]]:
    """Return (row, its timeline, its panel's title) for each panel of the picture.

    Of many cases those at the largest inputs are taken.
    """
    known = [s for s in table.sections if any(row.record.timeline for row in s.rows)]
    panels: list[tuple[Row, Timeline, str]] = []
    for most in range(1, len(known) + 1):
        more = [p for section in chosen_sections(known, most) for p in _of(section, table)]
        if panels and len(more) > MOST_PANELS:
            break
        panels = more
    return panels[:MOST_PANELS]


def _of(section: Section, table: Table) -> Iterator[tuple[Row, Timeline, str]]:
    for row in section.rows:
        timeline = row.record.timeline
        if timeline is not None:
            peak = size_text(max(timeline.requested_bytes()))
            unfit = ", does not fit" if row.record.status == "oom" else ""
            title = f"{row.record.variant}\n{short_title(section, table)}: peak {peak}{unfit}"
            yield row, timeline, title


def draw_timelines(table: Table) -> Figure:
    """Return the figure; ``timeline_rows`` must not be empty. All panels share one GiB axis."""
    rows = timeline_rows(table)
    figure, panels = panel_figure(table, "Memory over the steps", len(rows), _COLUMNS)
    top = _highest_gib(rows)
    card = next((r.record.capacity_bytes for r, *_ in rows if r.record.capacity_bytes), None)
    drawn_card = card / GIB if card is not None and card / GIB < _FAR * top else None
    top = max(top, drawn_card or 0.0) * 1.12
    for axes, (row, timeline, title) in zip(panels, rows, strict=True):
        _draw_panel(axes, row, timeline)
        if drawn_card is not None:
            axes.axhline(drawn_card, color=CAPACITY_COLOUR, linestyle="--", linewidth=1)
        axes.set_ylim(0, top)
        finish_panel(axes, title)
    for axes in panels[::_COLUMNS]:
        axes.set_ylabel("GiB", fontsize=8)
    for axes in panels[-_COLUMNS:]:
        axes.set_xlabel("each phase's allocations and releases", fontsize=7)
    handles = _legend(rows, card if drawn_card is not None else None)
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=7)
    return figure


def _highest_gib(rows: Sequence[tuple[Row, Timeline, str]]) -> float:
    heights = [max((*t.requested_bytes(), *t.reserved_bytes()), default=0) for _, t, _ in rows]
    return max(1, *heights) / GIB


def _stack(timeline: Timeline) -> dict[str, list[int]]:
    """Return part -> bytes at each point, in the order in which they are stacked."""
    stacked: dict[str, list[int]] = {}
    for name, column in timeline.held_bytes().items():
        part = category_part(name)
        below = stacked.get(part, [0] * len(column))
        stacked[part] = [a + b for a, b in zip(below, column, strict=True)]
    return {part: stacked[part] for part in PART_COLOURS if part in stacked}


def _draw_panel(axes: Axes, row: Row, timeline: Timeline) -> None:
    places, below = _places(timeline), [0.0] * len(timeline.events)
    for part, column in _stack(timeline).items():
        above = [b + size / GIB for b, size in zip(below, column, strict=True)]
        axes.fill_between(
            places,
            below,
            above,
            facecolor=PART_COLOURS[part],
            edgecolor=PAGE_COLOUR,
            linewidth=0.15,
            hatch=HATCHES[row.record.evidence],
        )
        below = above
    reserved = timeline.reserved_bytes()
    if reserved:
        axes.plot(places, [r / GIB for r in reserved], color=TEXT_COLOUR, linewidth=0.8)
    peak = timeline.peak()
    height = timeline.requested_bytes()[peak] / GIB
    axes.plot(places[peak], height, "v", color=TEXT_COLOUR, markersize=4)
    widths = _widths(timeline)
    axes.set_xlim(0, sum(width for _, width in widths))
    axes.set_xticks([])
    _mark_phases(axes, widths)


def _mark_phases(axes: Axes, widths: Sequence[tuple[str, float]]) -> None:
    """Draw where phases begin, and name each above the panel."""
    begin = 0.0
    for name, width in widths:
        if begin:
            axes.axvline(begin, color=TEXT_COLOUR, linewidth=0.5, linestyle=":")
        axes.text(
            begin + width / 2,
            0.985,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=5,
        )
        begin += width


def _widths(timeline: Timeline) -> list[tuple[str, float]]:
    """Return (phase, its width on the axis); what comes before the first phase belongs to it."""
    names = [name for name, _ in timeline.phases] or ["run"]
    return [(name, _WIDTHS.get(name, 1.0)) for name in names]


def _places(timeline: Timeline) -> list[float]:
    """Return where each point lies on the axis, a phase's points evenly over its width."""
    starts = [0, *(event for _, event in timeline.phases[1:]), timeline.events[-1] + 1]
    left = [0.0, *accumulate(width for _, width in _widths(timeline))]
    places = []
    for event in timeline.events:
        phase = bisect_right(starts, event) - 1
        within = (event - starts[phase]) / (starts[phase + 1] - starts[phase])
        places.append(left[phase] + within * (left[phase + 1] - left[phase]))
    return places


def _legend(rows: Sequence[tuple[Row, Timeline, str]], card_bytes: int | None) -> list[Artist]:
    shown = {category_part(name) for _, t, _ in rows for name in t.changes_bytes}
    hatch = HATCHES[rows[0][0].record.evidence]
    handles: list[Artist] = [
        Patch(facecolor=c, edgecolor=PAGE_COLOUR, hatch=hatch, label=PART_LABELS.get(part, part))
        for part, c in PART_COLOURS.items()
        if part in shown
    ]
    handles.append(
        Line2D([], [], color=TEXT_COLOUR, marker="v", linestyle="", markersize=4, label="peak")
    )
    if any(timeline.reserved_changes_bytes for _, timeline, _ in rows):
        handles.append(Line2D([], [], color=TEXT_COLOUR, linewidth=0.8, label="reserved"))
    if card_bytes is not None:
        text = f"the allocator's share: {size_text(card_bytes)}"
        handles.append(Line2D([], [], color=CAPACITY_COLOUR, linestyle="--", label=text))
    return handles
