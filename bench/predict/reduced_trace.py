"""Traces reduced to numbers: the state at the start, the events, and what to expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from bench.predict.alloc_conf import AllocatorSettings, settings_from_snapshot
from bench.predict.start_state import settle_blocks
from bench.predict.trace import (
    EventKind,
    RecordedSegment,
    Trace,
    TraceEvent,
    TraceFormatError,
    checked_segments,
    whole_number,
)

__all__ = ["reduced_trace"]

_LENGTHS: dict[str, int] = {  # fields without the stream, which may be left out
    "alloc": 3,
    "free": 2,
    "segment_alloc": 3,
    "segment_free": 3,
    "segment_map": 3,
    "segment_unmap": 3,
    "oom": 3,
}


def reduced_trace(data: Mapping[str, Any], device: int | None) -> Trace:
    """Make a trace from a reduced trace's dict; it holds one device, number 0.

    Errors: TraceFormatError saying what is missing or of the wrong kind.
    """
    if device not in (None, 0):
        raise TraceFormatError(f"it has no device {device}, only device 0")
    recorded = data.get("settings")
    definition = data.get("definition")
    settings = settings_from_snapshot(recorded) if isinstance(recorded, dict) else None
    settings = settings or AllocatorSettings()
    events = tuple(_event(row, index) for index, row in enumerate(_rows(data, "events")))
    if not events:
        raise TraceFormatError("its list of events is empty")
    segments = _segments(data, settings.expandable_segments)
    expected = data.get("expected")
    if not isinstance(expected, dict):
        raise TraceFormatError("it has no 'expected' reserved bytes")
    start, peak, end = (
        whole_number(expected.get(key), f"expected {key}")
        for key in ("reserved_at_start_bytes", "peak_reserved_bytes", "final_reserved_bytes")
    )
    return Trace(
        device=0,
        settings=settings,
        segments=settle_blocks(segments, events, settings),
        events=events,
        reserved_start_bytes=start,
        reserved_peak_bytes=peak,
        reserved_end_bytes=end,
        end_addresses=frozenset(
            whole_number(row[0], "a final segment's address")
            for row in _rows(expected, "final_segments")
        )
        if "final_segments" in expected
        else frozenset(),
        definition=definition if isinstance(definition, dict) else {},
    )


def _segments(data: Mapping[str, Any], expandable: bool) -> tuple[RecordedSegment, ...]:
    rows = _rows(data, "segments_at_start", 4)
    empty = checked_segments(_segment(row, expandable) for row in rows)
    blocks = sorted(
        (whole_number(row[0], "a block's address"), whole_number(row[1], "a block's size"))
        for row in _rows(data, "blocks_at_start", 2)
    )
    place, filled = 0, []
    for segment in empty:
        begun = place
        while place < len(blocks) and blocks[place][0] < segment.end:
            place += 1
        filled.append(replace(segment, blocks=tuple(blocks[begun:place])))
    if place < len(blocks):
        raise TraceFormatError(f"its block at {blocks[place][0]} lies in no segment")
    return checked_segments(filled)


def _segment(row: Sequence[Any], expandable: bool) -> RecordedSegment:
    return RecordedSegment(
        address=whole_number(row[0], "a segment's address"),
        size=whole_number(row[1], "a segment's size", at_least=1),
        stream=whole_number(row[2], "a segment's stream"),
        small=row[3] == "small",
        expandable=bool(row[4]) if len(row) > 4 else expandable,
    )


def _rows(data: Mapping[str, Any], key: str, at_least: int = 1) -> list[Sequence[Any]]:
    rows = data.get(key)
    if not isinstance(rows, list):
        raise TraceFormatError(f"it has no list {key!r}")
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) < at_least:
            raise TraceFormatError(f"{key}[{number}] is not a list of at least {at_least} values")
    return rows


def _event(row: Sequence[Any], index: int) -> TraceEvent:
    kind = row[0]
    length = _LENGTHS.get(kind) if isinstance(kind, str) else None
    if length is None or len(row) < length:
        raise TraceFormatError(f"event {index} is no event: {list(row)!r:.60}")
    address, size = row[1], row[2] if length > 2 else 0
    stream = row[3] if length > 2 and len(row) > 3 else 0
    return TraceEvent(
        cast(EventKind, kind),
        whole_number(address or 0, f"event {index}'s address"),
        whole_number(size, f"event {index}'s size"),
        whole_number(stream, f"event {index}'s stream"),
        (0, 0),
        index,
    )
