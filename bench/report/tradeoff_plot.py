"""Memory saved against what it costs as a picture: a panel for each input, the front marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from bench.report.cells import short_title
from bench.report.panels import chosen_sections, finish_panel, panel_figure, shortened
from bench.report.picture_files import tip
from bench.report.rows import Table
from bench.report.style import LINE_STYLES, PAGE_COLOUR, TEXT_COLOUR, series_look
from bench.report.tradeoffs import Trade, Tradeoff, make_tradeoff, pareto_front

__all__ = ["MOST_PANELS", "draw_tradeoffs", "tradeoffs"]

_LEGEND_LETTERS = 112  # that a line of the legend has room for, across the figure
_LEGEND_MARKER = 9  # letters' room of a marker and the space between columns

MOST_PANELS = 6
_COLUMNS = 3
_LARGEST = 3.0  # beyond this multiple of the baseline savings below 0 say little
_MOST_VARIANTS = 30
_AXIS = {
    "time": "time of a step, measured, x baseline",
    "FLOPs": "FLOPs of a step, counted, x baseline",
}


def tradeoffs(table: Table) -> list[Tradeoff]:
    """Return what is drawn, a panel each; of many inputs the largest of each network.

    An input at which only one case can be set against its baseline tells nothing and is left out.
    """
    made = {id(section): make_tradeoff(section) for section in table.sections}
    telling = [section for section in table.sections if len(made[id(section)].trades) > 1]
    return [made[id(section)] for section in chosen_sections(telling, MOST_PANELS)]


def draw_tradeoffs(table: Table) -> Figure:
    """Return the figure; ``tradeoffs`` must not be empty."""
    shown = tradeoffs(table)
    variants = list(dict.fromkeys(t.row.record.variant for one in shown for t in one.trades))
    looks = {name: series_look(number) for number, name in enumerate(variants[:_MOST_VARIANTS])}
    what = "Memory saved against what it costs"
    figure, panels = panel_figure(table, what, len(shown), _COLUMNS, (3.1, 2.4))
    for axes, tradeoff in zip(panels, shown, strict=True):
        _draw_panel(axes, tradeoff, looks)
        finish_panel(axes, short_title(tradeoff.section, table))
        axes.set_xlabel(_AXIS[tradeoff.cost], fontsize=7)
    filled = table.first.evidence == "measured"
    handles = [_marker(shortened(name), *looks[name], filled) for name in looks]
    style = LINE_STYLES[table.first.evidence]
    ring: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markersize": 9}
    handles.append(Line2D([], [], color=TEXT_COLOUR, linestyle=style, label="Pareto front", **ring))
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(4, _LEGEND_LETTERS // (longest + _LEGEND_MARKER)))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=7
    )
    return figure


def _marker(label: str, colour: str, marker: str, filled: bool) -> Line2D:
    return Line2D(
        [],
        [],
        color=colour,
        marker=marker,
        markerfacecolor=colour if filled else PAGE_COLOUR,
        linestyle="",
        markersize=5,
        label=label,
    )


def _draw_panel(axes: Axes, tradeoff: Tradeoff, looks: dict[str, tuple[str, str]]) -> None:
    front = pareto_front(tradeoff.trades)
    by_saving = max(trade.memory for trade in tradeoff.trades) <= _LARGEST
    for trade in tradeoff.trades:
        record = trade.row.record
        if record.variant not in looks:
            continue
        colour, marker = looks[record.variant]
        axes.plot(
            trade.cost,
            trade.saved if by_saving else trade.memory,
            marker,
            color=colour,
            markerfacecolor=colour if record.evidence == "measured" else PAGE_COLOUR,
            markersize=6,
            gid=tip(
                f"{record.variant}: {trade.memory:.3g} x memory at {trade.cost:.3g} x "
                f"{tradeoff.cost}{', on the Pareto front' if trade in front else ''}"
            ),
            zorder=3,
        )
    axes.margins(0.14)
    if by_saving:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_ylabel("memory saved", fontsize=7)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.invert_yaxis()  # up is better in every panel
        axes.set_ylabel("memory, x baseline", fontsize=7)
    _draw_front(axes, front, [trade.saved if by_saving else trade.memory for trade in front])
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _draw_front(axes: Axes, front: Sequence[Trade], heights: Sequence[float]) -> None:
    """Ring the front's points, and draw it as steps: what lies below and right is beaten."""
    (_, right), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    costs = [trade.cost for trade in front]
    axes.plot(costs, heights, "o", color=TEXT_COLOUR, markerfacecolor="none", markersize=11)
    axes.step(
        [costs[0], *costs, right],
        [bottom, *heights, heights[-1]],
        where="post",
        color=TEXT_COLOUR,
        linestyle=LINE_STYLES[front[0].row.record.evidence],
        linewidth=0.9,
        zorder=1,
    )
    axes.set_xlim(right=right)
    axes.set_ylim(bottom=bottom)
