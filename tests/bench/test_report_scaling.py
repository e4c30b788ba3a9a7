"""The table and the plot of memory against size: what stands in them, and what does not overlap."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.record import Record
from bench.report.markdown import report_files
from bench.report.rows import Table, make_tables
from bench.report.scaling import compared_by_size, scaling_grid, scaling_series, side_text
from bench.report.scaling_plot import draw_scaling, plot_scaling
from bench.report.style import RC
from tests.bench.records import GIB, make_record, make_table1

SIDES = (48, 64, 96, 128, 192, 256)


def sized(shape: tuple[int, ...], needs: int, **overrides: Any) -> Record:
    return make_record(
        requested_shape=shape,
        needs_bytes=needs - GIB // 2,
        environment={"suite": "scaling"},
        **overrides,
    )


def records(**overrides: Any) -> list[Record]:
    """1 GiB + 2048 bytes a voxel, plain; half of that with a technique."""
    return [
        sized((side,) * 3, GIB + slope * side**3, variant=variant, **overrides)
        for variant, slope in (("plain", 2048), ("checkpoint", 1024))
        for side in SIDES
    ]


def table_of(many: list[Record]) -> Table:
    (table,) = make_tables(many)
    return table


def drawn(many: list[Record]) -> Figure:
    with matplotlib.rc_context(RC):
        figure = draw_scaling(table_of(many))
        figure.canvas.draw()
    return figure


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def curves(axes: Axes) -> list[Any]:
    return [line for line in axes.get_lines() if line.get_marker() not in ("None", None, "")]


def test_a_table_of_six_sizes_of_a_variant_is_about_sizes_and_the_paper_s_is_not() -> None:
    assert compared_by_size(table_of(records()))
    assert not compared_by_size(table_of(make_table1()))


def test_the_grid_says_the_line_and_the_largest_input_of_each_card() -> None:
    """Plain on 8 GiB: 7 GiB / 2048 bytes are 3.5 x 2^20 voxels, 154.2 a side: 152.

    256 cubed voxels are 2^24: 33 GiB plain and 17 with the technique, which twice as many
    voxels, 33 GiB, do not yet leave behind: 48 GiB do.
    """
    plain, checkpoint = scaling_grid(scaling_series(table_of(records()))).to_dict("records")
    assert plain["network"] == "fcn"
    assert plain["bytes a voxel"] == "2,048"
    assert plain["fixed"] == "1.0 GiB"
    assert plain["off by up to"] == "0.0 %"
    cards = ("8 GiB", "32 GiB", "48 GiB", "80 GiB")
    assert [plain[card] for card in cards] == ["152³", "248³", r"288³\*", "&gt; 256³"]
    assert checkpoint["24 GiB"] == r"288³\*"
    assert checkpoint["48 GiB"] == "&gt; 256³"


def test_a_card_that_holds_nothing_has_a_dash() -> None:
    many = [sized((side,) * 3, 9 * GIB + 2048 * side**3) for side in SIDES]
    (row,) = scaling_grid(scaling_series(table_of(many))).to_dict("records")
    assert (row["8 GiB"], row["12 GiB"]) == ("-", "112³")


def test_a_batch_is_named_beside_its_network() -> None:
    row = scaling_grid(scaling_series(table_of(records(batch_size=4)))).to_dict("records")[0]
    assert row["network"] == "fcn, batch 4"


def test_sizes_are_written_short_where_all_sides_are_equal() -> None:
    assert [side_text(s) for s in ((96, 96, 96), (64, 64), (512, 512, 320), (7,))] == [
        *("96³", "64²", "512x512x320", "7"),
    ]


def test_the_report_has_the_table_of_limits_and_a_plot_of_lines() -> None:
    files = report_files("scaling", records())
    text = files["scaling.md"].decode()
    assert "### Largest input, predicted (cuda-shim)" in text
    assert "Each cell:" not in text
    assert "![scaling: fcn on v100-32gb" in text
    assert files["scaling.v100-32gb.predicted.png"] == plot_scaling(table_of(records()), "png")
    assert b"152\xc2\xb3" in files["scaling.md"]


def test_predicted_lines_are_dashed_with_open_markers_and_measured_ones_solid() -> None:
    predicted = curves(drawn(records()).axes[0])
    measured = curves(drawn(records(evidence="measured", tracer=None)).axes[0])
    assert {line.get_linestyle() for line in predicted} == {"--"}
    assert {line.get_markerfacecolor() for line in predicted} == {"white"}
    assert {line.get_linestyle() for line in measured} == {"-"}
    assert "white" not in {line.get_markerfacecolor() for line in measured}


def test_a_line_goes_through_bytes_a_voxel_at_each_size() -> None:
    line = curves(drawn(records()).axes[0])[0]
    assert [x for x, _ in points(line)] == [side**3 for side in SIDES]
    assert points(line)[0][1] == (GIB + 2048 * 48**3) / 48**3


def test_a_card_s_line_is_where_voxels_times_bytes_a_voxel_is_its_memory() -> None:
    axes = drawn(records()).axes[0]
    products = {
        round(x * y / GIB, 6)
        for line in axes.get_lines()
        if line.get_marker() == "None"
        for x, y in points(line)
    }
    assert products == {8, 12, 16, 24, 32, 48, 80}


def test_every_network_has_a_panel_and_no_text_of_a_panel_lies_on_another() -> None:
    slices = [
        sized((512, 512, n), 3 * GIB + n * 2**20, network="conv_lstm", variant="plain")
        for n in (8, 64, 320)
    ]
    figure = drawn([*records(), *slices])
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == ["fcn", "conv_lstm"]
    for axes in panels:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert boxes
        for one, other in combinations(boxes, 2):
            assert not one.overlaps(other)


def test_colours_tell_networks_of_one_kind_apart_and_markers_techniques() -> None:
    def one(variant: str, widths: str, techniques: list[dict[str, Any]]) -> list[Record]:
        made = [sized((s, s, s), GIB + 999 * s**3, variant=variant) for s in SIDES]
        for record in made:
            record.definition["network_options"] = {"widths": widths}
            record.definition["techniques"] = techniques
        return made

    use = [{"name": "checkpoint", "options": {}}]
    axes = drawn(
        [*one("full", "doubling", []), *one("full+c", "doubling", use), *one("p", "pocket", [])]
    ).axes[0]
    full, recomputed, pocket = curves(axes)
    assert full.get_color() == recomputed.get_color() != pocket.get_color()
    assert full.get_marker() == pocket.get_marker() != recomputed.get_marker()
