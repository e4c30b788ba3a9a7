"""Step times and voxels a second in reports: medians, spreads and noise, worked out by hand."""

from __future__ import annotations

import pytest
from rich.console import Console

from bench.case import PaperFigure
from bench.record import Record
from bench.report.cells import cells, notes
from bench.report.rows import Row, make_tables
from bench.report.terminal import results_table
from bench.report.times import step_time_cell, timing, voxel_rate_cell
from tests.bench.records import GIB, make_record


def timed(*times_s: float, **fields: object) -> Record:
    measured = {"evidence": "measured", "tracer": None, "card": "h200-141gb"}
    return make_record(step_times_s=times_s, **{**measured, **fields})


def test_median_and_spread_are_of_the_readings_in_any_order() -> None:
    # sorted 1, 2, 3, 4, 5: quartiles at places 1 and 3, which are 2 and 4
    found = timing((5.0, 1.0, 4.0, 2.0, 3.0))

    assert found is not None
    assert (found.median, found.iqr) == (3.0, 2.0)


def test_quartiles_between_readings_are_interpolated() -> None:
    # sorted 1, 2, 4, 8: quartiles at places 0.75 and 2.25, which are 1.75 and 5
    found = timing((8.0, 1.0, 2.0, 4.0))

    assert found is not None
    assert (found.median, found.iqr) == (3.0, 3.25)


def test_one_outlier_of_five_is_no_noise() -> None:
    found = timing((1.0, 1.0, 1.0, 1.0, 9.0))

    assert found is not None
    assert not found.noisy


@pytest.mark.parametrize(("off", "noisy"), [(0.0625, False), (0.078125, True)])
def test_a_spread_above_a_tenth_of_the_median_is_noise(off: float, noisy: bool) -> None:
    """Five readings whose quartiles are ``off`` from the median of 1: powers of two are exact."""
    found = timing((1 - off, 1 - off, 1.0, 1 + off * 0.5, 1 + off * 0.5))

    assert found is not None
    assert found.iqr == off * 1.5
    assert found.noisy is noisy


def test_without_readings_there_is_no_time_and_of_one_no_spread() -> None:
    assert timing(()) is None
    assert step_time_cell(timed()) == voxel_rate_cell(timed()) == "-"
    assert step_time_cell(timed(0.5)) == "0.5 s"
    assert voxel_rate_cell(timed(0.5, shape=(100, 100, 100))) == "2,000,000"


def test_a_record_shows_median_spread_and_noise() -> None:
    assert step_time_cell(timed(0.5, 0.512, 0.52)) == "0.512 s, IQR 0.01 s"
    assert step_time_cell(timed(0.25, 0.5, 0.75)) == "0.5 s, IQR 0.25 s, noisy"


def test_voxels_are_of_the_whole_batch_as_it_was_run() -> None:
    asked, run = (10, 10, 9), (10, 10, 10)
    record = timed(1.0, 1.0, 1.0, batch_size=4, requested_shape=asked, shape=run)

    assert voxel_rate_cell(record) == "4,000, IQR 0"


def test_a_clock_too_coarse_for_a_step_gives_no_rate() -> None:
    assert voxel_rate_cell(timed(0.0, 0.0)) == "-"


def test_the_table_says_what_the_columns_mean_and_when_they_are_noise() -> None:
    (quiet,) = make_tables([timed(1.0, 1.0, 1.0)])
    (noisy,) = make_tables([timed(1.0, 2.0, 3.0)])
    (untimed,) = make_tables([timed()])

    assert any(n.startswith("step time: median of 3 measured steps after") for n in notes(quiet))
    assert not any("noisy" in n for n in notes(quiet))
    assert any(n.startswith("noisy: an IQR above 10% of the median") for n in notes(noisy))
    assert not any("step time" in n for n in notes(untimed))


def test_the_terminal_shows_times_where_there_is_room() -> None:
    texts = []
    for width in (250, 60):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(results_table([timed(0.5, 0.512, 0.52)]))
        texts.append(capture.get())

    assert "0.512 s, IQR 0.01 s" in texts[0]
    assert "IQR 0.01" not in texts[1]


def test_a_measured_case_that_does_not_fit_is_more_than_the_card_as_papers_print_it() -> None:
    """The card: 31.5 GiB for the allocator and 0.5 GiB of context; what it needs is not known."""
    record = timed(
        status="oom",
        needs_bytes=None,
        capacity_bytes=31 * GIB + GIB // 2,
        card="v100-32gb",
        paper=PaperFigure(text="> 32 GB", relation=">", bytes=32 * 10**9),
    )
    found = cells(Row(record, None))

    assert (found["GPU memory"], found["paper"]) == ("> 32.0 GiB", "> 32 GB")
    assert found["of paper"] == "agrees"
    assert found["allocated"] == "> 2.5 GiB"
