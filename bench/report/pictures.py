"""The pictures of a table: which there are, what each shows in words, and how it is drawn.

A page shows them and ``membench report --figures`` writes them, the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.report.cells import figure_text, short_title, size_text
from bench.report.rows import Table
from bench.report.scaling import compared_by_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Picture", "table_pictures"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture; ``name`` is a file's, ``caption`` says what it shows, ``alt`` tells it in words.

    ``draw`` makes it; None where there is nothing to draw, and the caption says why.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[], Figure] | None


def table_pictures(table: Table) -> list[Picture]:
    """Return the pictures of a table, each with the evidence and the card in its words."""
    found = [_bars(table), _timeline(table), _sizes(table), _trade(table)]
    return found + ([_voxels(table)] if compared_by_size(table) else [])


def _where(table: Table) -> str:
    evidence = "Measured" if table.first.evidence == "measured" else "Predicted"
    return f"{evidence}, on {table.first.card or 'an unknown card'}."


def _bars(table: Table) -> Picture:
    from bench.report.plots import draw_table

    told = "; ".join(
        f"{short_title(section, table)}: "
        + ", ".join(f"{row.record.variant} {figure_text(row)}" for row in section.rows[:12])
        for section in table.sections[:6]
    )
    known = any(row.record.peak_holders for row in table.rows)
    by = "by category" if known else "by part; its records name no holders of the peak"
    return Picture(
        "bars",
        "Who holds the memory",
        f"GPU memory of the process at its peak, {by}. Paler: does not fit the card, and is shown "
        f"as it would be on a larger one. {_where(table)}",
        f"Bars of GPU memory. {_where(table)} {told}",
        lambda: draw_table(table),
    )


def _timeline(table: Table) -> Picture:
    from bench.report.timeline_plot import draw_timelines, timeline_rows

    rows = timeline_rows(table)
    title = "Memory over the steps"
    if not rows:
        why = "None of these records has a timeline: measured and older ones carry none."
        return Picture("timeline", title, why, why, None)
    cases = sum(row.record.timeline is not None for row in table.rows)
    rest = f" {len(rows)} of {cases} cases, at the largest inputs." if len(rows) < cases else ""
    told = "; ".join(
        f"{row.record.variant}: peak {size_text(max(timeline.requested_bytes()))}"
        for row, timeline, _ in rows
    )
    return Picture(
        "timeline",
        title,
        "Requested bytes by category while the network is made and two steps run: forward, "
        "backward, optimizer. A phase is as wide everywhere, whatever its time. The line above "
        f"is what the allocator has reserved.{rest} {_where(table)}",
        f"Stacked areas of memory over two steps. {_where(table)} {told}",
        lambda: draw_timelines(table),
    )


def _sizes(table: Table) -> Picture:
    from bench.report.size_plot import draw_sizes, size_series

    panels = size_series(table)
    title = "Memory against input size"
    if not panels:
        why = "No case has a second size to be compared with."
        return Picture("sizes", title, why, why, None)
    told = "; ".join(
        f"{name}: {one.record.variant} from {size_text(one.points[0].bytes)} "
        f"to {size_text(one.points[-1].bytes)}"
        for name, series in panels.items()
        for one in series
    )
    return Picture(
        "sizes",
        title,
        "The smallest card memory on which a case completes, context included, against the voxels "
        f"of its input; both axes are logarithmic. Lines across: cards' memory. {_where(table)}",
        f"Lines of memory against input size. {_where(table)} {told}",
        lambda: draw_sizes(table),
    )


def _trade(table: Table) -> Picture:
    from bench.report.tradeoff_plot import draw_tradeoffs, tradeoffs
    from bench.report.tradeoffs import make_tradeoff, pareto_front

    shown, title = tradeoffs(table), "Memory saved against what it costs"
    every = [make_tradeoff(section) for section in table.sections]
    why = list(dict.fromkeys(f"{name} ({why})" for one in every for name, why in one.left_out))
    rest = (
        f" Left out: {', '.join(why[:20])}{', and more' if len(why) > 20 else ''}." if why else ""
    )
    if not shown:
        none = f"No case can be set against a baseline.{rest}"
        return Picture("trade", title, none, none, None)
    if any(one.cost == "FLOPs" for one in shown):
        cost = (
            "No step was timed, so the cost is that of FLOPs: it counts what is computed again, "
            "and nothing of bytes moved or of faster arithmetic."
        )
    else:
        cost = "The cost is the median time of the measured steps."
    told = "; ".join(
        f"{short_title(one.section, table)}: Pareto front "
        + ", ".join(t.row.record.variant for t in pareto_front(one.trades))
        for one in shown
    )
    return Picture(
        "trade",
        title,
        f"Each case against the baseline at its input; up and left is better. {cost} Ringed: on "
        f"the Pareto front, no other case takes less of both.{rest} {_where(table)}",
        f"Points of memory against cost. {_where(table)} {told}",
        lambda: draw_tradeoffs(table),
    )


def _voxels(table: Table) -> Picture:
    from bench.report.scaling_plot import draw_scaling

    return Picture(
        "voxels",
        "Bytes a voxel",
        "GPU memory over the voxels of the input; both axes are logarithmic, so a card's memory "
        f"is a falling line. {_where(table)}",
        f"Lines of bytes a voxel against input size. {_where(table)}",
        lambda: draw_scaling(table),
    )
