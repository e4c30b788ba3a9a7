"""The plot of a table: what its bars are, and that nothing is drawn over anything else."""

from __future__ import annotations

import io
from itertools import combinations
from typing import Any

import matplotlib
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.transforms import Bbox

from bench.report.plots import bar_parts, draw_table, plot_table
from bench.report.rows import Row, make_tables
from bench.report.style import RC
from tests.bench.records import GIB, make_record, make_table1

MEASURED: dict[str, Any] = {"evidence": "measured", "tracer": None}


def drawn(*records: Any) -> Figure:
    (table,) = make_tables(records)
    with matplotlib.rc_context(RC):
        figure = draw_table(table)
        figure.canvas.draw()
    return figure


def bars(figure: Figure) -> list[Any]:
    containers = [c for c in figure.axes[0].containers if isinstance(c, BarContainer)]
    return [patch for container in containers for patch in container.patches]


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_parts_of_a_bar_add_up_to_the_figure() -> None:
    for record in make_table1():
        row = Row(record, None)
        assert sum(size for _, size in bar_parts(row)) == row.figure_bytes


def test_a_bar_is_stacked_of_the_parts_of_the_record() -> None:
    assert bar_parts(Row(make_record(), None)) == [
        ("tensors", 2 * GIB),
        ("workspace", GIB // 2),
        ("allocator", GIB // 2),
        ("context", GIB // 2),
    ]


def test_a_case_that_does_not_fit_is_one_bar_of_needs_and_the_context() -> None:
    row = Row(make_record(status="oom", needs_bytes=40 * GIB), None)
    assert bar_parts(row) == [("needs", 40 * GIB), ("context", GIB // 2)]


def test_parts_that_are_not_known_are_not_drawn_apart() -> None:
    row = Row(make_record(parts={"tensors_bytes": None}), None)
    assert bar_parts(row) == [("tensors", 3 * GIB), ("context", GIB // 2)]


@pytest.mark.parametrize("status", ["failed", "oom"])
def test_a_case_without_a_figure_has_no_bar(status: str) -> None:
    assert bar_parts(Row(make_record(status=status, needs_bytes=None), None)) == []


def test_predicted_bars_are_hatched_and_measured_ones_solid() -> None:
    assert {bar.get_hatch() for bar in bars(drawn(make_record()))} == {"////"}
    assert {bar.get_hatch() for bar in bars(drawn(make_record(**MEASURED)))} == {""}


def test_bars_end_at_their_figures_in_gib() -> None:
    """Baseline at 96x96x96: 2.9 GiB reserved and 0.5 of context end at 3.4 on the axis."""
    figure = drawn(*make_table1())
    first_row = [bar for bar in bars(figure) if bar.get_y() + bar.get_height() / 2 == 1.0]
    assert len(first_row) == 4
    assert max(bar.get_x() + bar.get_width() for bar in first_row) == pytest.approx(3.4, abs=1e-6)
    assert "GiB" in figure.axes[0].get_xlabel()


def test_the_card_is_a_line_where_it_is_near_the_bars() -> None:
    """31.5 GiB: drawn beside 26.1 + 0.5, not beside 3.5, where it would squeeze the bars."""
    near, far = drawn(*make_table1()), drawn(make_record())
    lines = [line for line in near.axes[0].lines if line.get_linestyle() == "--"]
    assert [float(line.get_xdata()[0]) for line in lines] == [31.5]  # type: ignore[index, arg-type]
    assert "the card: 31.5 GiB" in legend_of(near)
    assert not [line for line in far.axes[0].lines if line.get_linestyle() == "--"]
    assert not [label for label in legend_of(far) if "the card" in label]


def test_the_legend_names_what_is_drawn_and_nothing_else() -> None:
    assert legend_of(drawn(*make_table1())) == [
        *("tensors", "workspace", "allocator's cache", "context", "needed, does not fit"),
        *("the paper's figure", "the paper: more than", "the card: 31.5 GiB"),
    ]
    measured = drawn(make_record(**MEASURED, parts={"workspace_bytes": None}))
    assert legend_of(measured) == ["tensors and workspaces", "allocator's cache", "context"]


def test_every_row_has_its_name_and_its_figure_beside_it() -> None:
    records = [*make_table1()[-6:], make_record(variant="bad", status="failed", position=99)]
    axes = drawn(*records).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [record.variant for record in records]
    texts = [text.get_text() for text in axes.texts]
    assert "does not fit: needs 41.7 GiB" in texts
    assert "14.8 GiB" in texts
    assert "failed" in texts
    assert drawn(make_record(status="oom", needs_bytes=None)).axes[0].texts[1].get_text() == (
        "does not fit"
    )


def boxes(figure: Figure) -> dict[str, Bbox]:
    """Return where every text of the picture lies, in pixels, and the axes themselves."""
    axes = figure.axes[0]
    found = {f"text {i}": text.get_window_extent() for i, text in enumerate(axes.texts)}
    labels = [*axes.get_yticklabels(), axes.xaxis.label]
    found |= {f"label {i}": label.get_window_extent() for i, label in enumerate(labels)}
    found["legend"] = figure.legends[0].get_window_extent()
    found["title"] = axes._left_title.get_window_extent()  # type: ignore[attr-defined]
    return found


def test_no_text_lies_over_another_or_out_of_the_picture() -> None:
    figure = drawn(*make_table1())
    found = boxes(figure)
    for (first, one), (second, other) in combinations(found.items(), 2):
        assert not one.overlaps(other), (first, second)
    for name, box in found.items():
        assert box.x0 >= 0, name
        assert box.x1 <= figure.bbox.x1, name
        assert box.y0 >= 0, name
        assert box.y1 <= figure.bbox.y1, name


def test_figures_stand_right_of_everything_that_is_drawn() -> None:
    """So that no bar, marker or line runs through a figure."""
    axes = drawn(*make_table1()).axes[0]
    figures = [text for text in axes.texts if "GiB" in text.get_text()]
    assert len(figures) == 18
    assert all(text.get_window_extent().x0 > axes.bbox.x1 for text in figures)


def test_a_plot_is_a_picture_and_the_same_each_time() -> None:
    (table,) = make_tables(make_table1()[:3])
    png, svg = plot_table(table, "png"), plot_table(table, "svg")
    height, width = imread(io.BytesIO(png)).shape[:2]
    assert (width, height) == (1350, 375)  # 9 in by 1.5 + 4 * 0.25 in, 150 dots an inch
    assert b"<svg" in svg
    assert plot_table(table, "png") == png
    assert plot_table(table, "svg") == svg


def test_names_are_drawn_as_they_are() -> None:
    """Dollar signs are formulas to matplotlib, and must not be here: this one would not parse."""
    figure = drawn(make_record(variant="$\\frac$", card="$"))
    assert figure.axes[0].get_yticklabels()[0].get_text() == "$\\frac$"


def test_drawing_leaves_the_reader_s_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    (table,) = make_tables([make_record()])
    plot_table(table, "svg")
    assert dict(matplotlib.rcParams) == before


def test_a_case_that_needs_many_cards_does_not_squeeze_the_others() -> None:
    """It runs to the edge, three times the card's 31.5 GiB; what it needs is written there."""
    figure = drawn(
        make_record(variant="fits"),
        make_record(variant="far", status="oom", needs_bytes=450 * GIB),
    )
    axes = figure.axes[0]
    assert axes.get_xlim()[1] == pytest.approx(3 * 31.5 * 1.03)
    assert "does not fit: needs 450.5 GiB" in [text.get_text() for text in axes.texts]
