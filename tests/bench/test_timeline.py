"""The timeline of a record: what its changes add up to, and what is no timeline."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from bench.record import Record
from bench.timeline import Timeline, differences
from tests.bench.records import make_record


def make_timeline(**overrides: Any) -> Timeline:
    """Three points: 10, 40 and 25 bytes requested; 12, 44 and 28 allocated; 64 reserved."""
    values: dict[str, Any] = {
        "events": (0, 4, 9),
        "phases": (("model", 0), ("forward", 4)),
        "changes_bytes": {"parameter": (10, 0, 0), "activation": (0, 30, -15)},
        "rounding_changes_bytes": (2, 2, -1),
        "reserved_changes_bytes": (64, 0, 0),
    }
    return Timeline(**values | overrides)


def test_changes_add_up_to_what_is_held() -> None:
    timeline = make_timeline()
    assert timeline.held_bytes() == {"parameter": (10, 10, 10), "activation": (0, 30, 15)}
    assert timeline.requested_bytes() == (10, 40, 25)
    assert timeline.allocated_bytes() == (12, 44, 28)
    assert timeline.reserved_bytes() == (64, 64, 64)
    assert timeline.peak() == 1


def test_differences_and_sums_undo_each_other() -> None:
    assert differences([5, 7, 7, 3]) == (5, 2, 0, -4)
    assert differences([]) == ()


def test_what_was_not_reached_is_not_known() -> None:
    timeline = make_timeline(rounding_changes_bytes=(), reserved_changes_bytes=(), oom_event=4)
    assert timeline.allocated_bytes() == ()
    assert timeline.reserved_bytes() == ()


def test_a_timeline_without_categories_holds_nothing() -> None:
    assert make_timeline(changes_bytes={}).requested_bytes() == (0, 0, 0)


def test_a_record_reads_its_timeline_back() -> None:
    record = make_record(timeline=make_timeline())
    assert Record.from_dict(json.loads(record.to_json())) == record


def test_a_record_of_an_earlier_version_has_no_timeline() -> None:
    data = json.loads(make_record().to_json())
    del data["timeline"]
    assert Record.from_dict(data).timeline is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"events": []}, "differ in length"),
        ({"events": [0, 4]}, "differ in length"),
        ({"changes_bytes": {"parameter": [1]}}, "differ in length"),
        ({"reserved_changes_bytes": [1, 2]}, "differ in length"),
        ({"changes_bytes": {"parameter": [1, 2, 0.5]}}, "not a whole number"),
        ({"events": [0, True, 9]}, "not a whole number"),
    ],
    ids=str,
)
def test_columns_that_do_not_fit_together_are_refused(change: Any, message: str) -> None:
    data = json.loads(json.dumps(dataclasses.asdict(make_timeline()))) | change
    with pytest.raises(ValueError, match=message):
        Timeline.from_dict(data)
