"""What a bar is stacked of: categories where a record knows them, parts where it does not."""

from __future__ import annotations

from typing import Any

from bench.record import Holder
from bench.report.parts import bar_parts, category_part
from bench.report.rows import Row
from tests.bench.records import GIB, make_record
from tests.bench.test_timeline import make_timeline


def holder(category: Any, size: int) -> Holder:
    return Holder(module="", operator="", source_line="", category=category, bytes=size)


def test_a_bar_of_known_holders_is_stacked_by_category() -> None:
    """3 GiB reserved, of which holders have 2: the allocator has the rest. 0.5 GiB of context."""
    holders = (holder("activation", GIB), holder("parameter", GIB // 2), holder("activation", GIB))
    row = Row(make_record(peak_holders=holders), None)
    assert bar_parts(row) == [
        ("parameter", GIB // 2),
        ("activation", 2 * GIB),
        ("allocator", GIB // 2),
        ("context", GIB // 2),
    ]


def test_a_category_of_a_later_version_is_drawn_as_another_one() -> None:
    assert category_part("novel") == "other"
    row = Row(make_record(peak_holders=(holder("novel", GIB),)), None)
    assert ("other", GIB) in bar_parts(row)


def test_holders_that_hold_more_than_the_process_are_not_believed() -> None:
    row = Row(make_record(peak_holders=(holder("activation", 9 * GIB),)), None)
    assert [name for name, _ in bar_parts(row)] == ["tensors", "workspace", "allocator", "context"]


def test_a_case_that_does_not_fit_is_stacked_of_its_timeline_s_peak() -> None:
    """At the peak 10 bytes of parameters and 30 of activations; it needs 100 of the allocator."""
    row = Row(make_record(status="oom", needs_bytes=100, timeline=make_timeline()), None)
    assert bar_parts(row) == [
        ("parameter", 10),
        ("activation", 30),
        ("allocator", 60),
        ("context", GIB // 2),
    ]
    assert sum(size for _, size in bar_parts(row)) == row.figure_bytes
