"""What a report compares with what, worked out in bytes by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bench.case import PaperFigure
from bench.record import Record
from bench.report.cells import cells, figure_text, per_cent_text, ratio_text
from bench.report.rows import Row, Table, make_tables
from tests.bench.records import GIB, make_record, make_table1


def oom(**overrides: Any) -> Record:
    """Return a case that needs 40 GiB of the allocator, where the card offers 31 of it."""
    return make_record(**{"status": "oom", "needs_bytes": 40 * GIB, **overrides})


def rows_of(*records: Record) -> dict[str, Row]:
    (table,) = make_tables(records)
    return {row.record.variant: row for row in table.rows}


def printed(text: str, size: int) -> PaperFigure:
    relation = text[0] if text[0] in "~>" else "="
    return PaperFigure(text=text, relation=relation, bytes=size)  # type: ignore[arg-type]


def test_the_figure_is_what_the_process_held() -> None:
    row = Row(make_record(process_bytes=7 * GIB), None)
    assert row.figure_bytes == 7 * GIB
    assert figure_text(row) == "7.0 GiB"


def test_needs_and_card_count_the_context() -> None:
    """31 GiB for the allocator and 0.5 of context are a card of 31.5 GiB; needs likewise."""
    row = Row(oom(), None)
    assert row.card_bytes == 31 * GIB + GIB // 2
    assert row.needs_bytes == row.figure_bytes == 40 * GIB + GIB // 2
    assert figure_text(row) == "does not fit 31.5 GiB: needs 40.5 GiB"


def test_a_case_that_does_not_fit_says_only_what_is_known() -> None:
    assert figure_text(Row(oom(needs_bytes=None), None)) == "> 31.5 GiB, does not fit"
    without_context = oom(parts={"context_bytes": None})
    assert Row(without_context, None).needs_bytes is None
    assert (
        figure_text(Row(without_context, None))
        == "does not fit 31.0 GiB of allocator: needs 40.0 GiB of allocator"
    )
    nothing = oom(parts={"context_bytes": None}, needs_bytes=None, capacity_bytes=None)
    assert figure_text(Row(nothing, None)) == "does not fit"


@pytest.mark.parametrize("status", ["failed", "timeout", "skipped"])
def test_a_case_that_did_not_end_has_its_status_for_a_figure(status: str) -> None:
    """Whatever bytes such a record holds, none of them is a figure."""
    row = Row(make_record(status=status, process_bytes=GIB), make_record())
    assert row.figure_bytes is None
    assert row.ratio is None
    assert [cells(row)[name] for name in ("needs", "allocated", "ratio")] == ["-", "-", "-"]
    assert Row(make_record(), make_record(status=status)).ratio is None
    assert figure_text(row) == cells(row)["GPU memory"] == cells(row)["status"] == status


def test_ratios_are_of_the_process_where_both_fit() -> None:
    rows = rows_of(
        make_record(process_bytes=8 * GIB, needs_bytes=1),
        make_record(variant="small", process_bytes=2 * GIB, needs_bytes=1),
    )
    assert ratio_text(rows["baseline"].ratio) == "1.00"
    assert ratio_text(rows["small"].ratio) == "0.25"


def test_ratios_are_of_needs_and_starred_where_one_does_not_fit() -> None:
    """(15 + 0.5) / (30.5 + 0.5) = 0.5, whatever the process of the one that fits held."""
    half = make_record(variant="half", process_bytes=29 * GIB, needs_bytes=15 * GIB)
    rows = rows_of(oom(needs_bytes=30 * GIB + GIB // 2), half)
    assert ratio_text(rows["half"].ratio) == "0.50*"
    assert ratio_text(rows["baseline"].ratio) == "1.00*"


def test_there_is_no_ratio_without_what_both_need() -> None:
    rows = rows_of(oom(needs_bytes=None), make_record(variant="fits"))
    assert rows["fits"].ratio is None
    assert ratio_text(rows["fits"].ratio) == "-"


def test_the_baseline_is_the_variant_of_that_name_wherever_it_stands() -> None:
    rows = rows_of(
        make_record(variant="first", process_bytes=GIB),
        make_record(variant="baseline", process_bytes=2 * GIB),
    )
    assert rows["first"].baseline is rows["baseline"].record
    assert ratio_text(rows["first"].ratio) == "0.50"


def test_the_suites_own_baseline_comes_before_any_name() -> None:
    rows = rows_of(
        make_record(variant="baseline", baseline="second"),
        make_record(variant="second", baseline="second", process_bytes=2 * GIB),
    )
    assert rows["baseline"].baseline is rows["second"].record
    assert ratio_text(rows["baseline"].ratio) == "1.75"  # 3.5 GiB over 2


def test_without_that_name_the_baseline_is_the_first_variant_of_the_suite() -> None:
    """First by its place in the suite: records lie in the order in which cases finished."""
    rows = rows_of(
        make_record(variant="b", position=2, process_bytes=GIB),
        make_record(variant="a", position=1, process_bytes=4 * GIB),
    )
    assert list(rows) == ["a", "b"]
    assert ratio_text(rows["b"].ratio) == "0.25"


def test_a_shape_that_lacks_the_baseline_has_no_ratios() -> None:
    (table,) = make_tables(
        [
            make_record(variant="a", position=1),
            make_record(variant="b", position=2),
            make_record(variant="b", position=3, requested_shape=(32, 32, 32)),
        ]
    )
    assert [row.ratio is None for row in table.rows] == [False, False, True]
    assert table.baselines == ("a",)


@pytest.mark.parametrize(
    "difference",
    [
        {"requested_shape": (96, 96, 104)},
        {"shape": (96, 96, 104)},
        {"mode": "infer"},
        {"batch_size": 2},
        {"network": "pocket"},
    ],
    ids=str,
)
def test_another_workload_is_another_section(difference: dict[str, Any]) -> None:
    (table,) = make_tables([make_record(), make_record(variant="other", **difference)])
    assert len(table.sections) == 2
    assert [row.record.variant for row in table.rows] == ["baseline", "other"]
    assert table.rows[1].baseline is not table.rows[0].record


@pytest.mark.parametrize(
    "difference",
    [
        {"evidence": "measured"},
        {"tracer": "cpu"},
        {"card": "h200-141gb"},
        {"capped_to": "rtx4090-24gb"},
        {"environment": {"suite": "other"}},
        {"environment": {"torch": "2.11.0"}},
        {"environment": {"allocator_settings": "expandable_segments:True"}},
    ],
    ids=str,
)
def test_what_was_made_otherwise_is_another_table_and_never_in_one_ratio(
    difference: dict[str, Any],
) -> None:
    tables = make_tables([make_record(), make_record(variant="other", **difference)])
    assert [len(table.rows) for table in tables] == [1, 1]
    baseline = tables[1].rows[0].baseline
    assert baseline is not None
    assert baseline.variant == "other"


def test_a_case_that_died_before_it_could_name_its_torch_stays_in_its_table() -> None:
    dead = make_record(variant="dead", status="failed", environment={"torch": None})
    (table,) = make_tables([dead, make_record()])
    assert {row.record.variant for row in table.rows} == {"dead", "baseline"}


@pytest.mark.parametrize(
    ("paper", "process_bytes", "expected"),
    [
        (printed("2.0 GB", 2 * 10**9), 10**9, "50 %"),
        (printed("~ 2.0 GB", 2 * 10**9), 5 * 10**9, "250 %"),
        (printed("> 2 GB", 2 * 10**9), 2 * 10**9 + 1, "agrees"),
        (printed("> 2 GB", 2 * 10**9), 2 * 10**9, "disagrees"),
        (None, 10**9, "-"),
    ],
)
def test_ours_is_set_against_the_paper_s_in_bytes(
    paper: PaperFigure | None, process_bytes: int, expected: str
) -> None:
    row = Row(make_record(paper=paper, process_bytes=process_bytes), None)
    assert per_cent_text(row) == expected
    assert cells(row)["paper"] == (paper.text if paper else "-")


def test_where_it_does_not_fit_the_paper_is_set_against_needs() -> None:
    twice = printed("~ 20.25 GiB", 20 * GIB + GIB // 4)
    assert per_cent_text(Row(oom(paper=twice), None)) == "200 %*"
    assert per_cent_text(Row(oom(paper=printed("> 32 GB", 32 * 10**9)), None)) == "agrees"
    assert per_cent_text(Row(oom(paper=printed("> 41 GiB", 41 * GIB)), None)) == "disagrees"


def test_not_fitting_alone_agrees_only_with_what_the_card_could_tell() -> None:
    """Over 31.5 GiB is over 31.5 GiB; whether it is over 31.5 GiB and a byte is not known."""
    held = 31 * GIB + GIB // 2
    unknown = {"needs_bytes": None}
    assert Row(oom(paper=printed("> 31.5 GiB", held), **unknown), None).agreement == "agrees"
    assert Row(oom(paper=printed("> 32 GiB", held + 1), **unknown), None).agreement is None
    assert per_cent_text(Row(oom(paper=printed("~ 1 GiB", GIB), **unknown), None)) == "-"


def test_a_paper_figure_of_a_later_version_is_read() -> None:
    record = make_record(paper=printed("2.0 GB", 2 * 10**9))
    record.definition["paper"]["page"] = 3
    assert Row(record, None).paper == printed("2.0 GB", 2 * 10**9)


def test_peaks_of_a_run_that_ended_for_want_of_memory_are_lower_bounds() -> None:
    assert cells(Row(oom(peak_allocated_bytes=30 * GIB), None))["allocated"] == "> 30.0 GiB"
    assert cells(Row(oom(peak_reserved_bytes=None), None))["reserved"] == "-"
    assert cells(Row(make_record(), None))["allocated"] == "2.5 GiB"


def test_evidence_names_what_traced_a_prediction() -> None:
    assert cells(Row(make_record(), None))["evidence"] == "predicted (cuda-shim)"
    measured = make_record(evidence="measured", tracer=None)
    assert cells(Row(measured, None))["evidence"] == "measured"
    assert "not recorded" in cells(Row(make_record(tracer=None), None))["evidence"]


def test_table_1_is_one_table_of_three_shapes() -> None:
    records = make_table1()
    tables: list[Table] = make_tables(reversed(records))
    (table,) = tables
    assert [len(section.rows) for section in table.sections] == [6, 6, 6]
    assert [row.record for row in table.rows] == records
