"""PyTorch's memory snapshots: their data, of any version, made into a trace.

A snapshot holds the segments at its end and the events before it, as many as the history's
buffer kept; the state at the start follows by running the events backwards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.predict.alloc_conf import settings_from_snapshot
from bench.predict.allocator import DEFAULT_POOL, PoolId
from bench.predict.start_state import state_at_start
from bench.predict.trace import (
    EventKind,
    RecordedSegment,
    Trace,
    TraceEvent,
    TraceFormatError,
    checked_segments,
    whole_number,
)

__all__ = ["reserved_course", "snapshot_trace"]

_KINDS: dict[str, EventKind] = {
    "alloc": "alloc",
    "free_requested": "free_requested",
    "free_completed": "free_completed",
    "segment_alloc": "segment_alloc",
    "segment_free": "segment_free",
    "segment_map": "segment_map",
    "segment_unmap": "segment_unmap",
    "oom": "oom",
}
_RECORD = "call torch.cuda.memory._record_memory_history() before the run to be traced"


def snapshot_trace(data: Mapping[str, Any], device: int | None) -> Trace:
    """Make the trace of ``device`` (None: the one with most events) from a snapshot's dict.

    Errors: TraceFormatError saying what is missing or of the wrong kind.
    """
    traces, segments = data.get("device_traces"), data.get("segments")
    if not isinstance(traces, list) or not isinstance(segments, list):
        raise TraceFormatError("a snapshot needs the lists 'segments' and 'device_traces'")
    chosen = _choose_device(traces, device)
    settings = settings_from_snapshot(_mapping(data.get("allocator_settings") or {}, "settings"))
    final = checked_segments(
        segment
        for number, entry in enumerate(segments)
        if (segment := _segment(_mapping(entry, f"segment {number}"), chosen)) is not None
    )
    events = _events(traces[chosen], final)
    if not any(event.kind in ("alloc", "free", "free_completed", "oom") for event in events):
        raise TraceFormatError(f"device {chosen} has no recorded events; {_RECORD}")
    start = state_at_start(final, events, settings)
    reserved_start, peak = reserved_course(sum(s.size for s in final), events)
    return Trace(
        device=chosen,
        settings=settings,
        segments=start,
        events=events,
        reserved_start_bytes=reserved_start,
        reserved_peak_bytes=peak,
        reserved_end_bytes=sum(segment.size for segment in final),
        end_addresses=frozenset(segment.address for segment in final),
    )


def reserved_course(end_bytes: int, events: Iterable[TraceEvent]) -> tuple[int, int]:
    """Return reserved bytes at the start and at the peak, from those at the end."""
    course = highest = 0
    for event in events:
        if event.kind in ("segment_alloc", "segment_map"):
            course += event.size
            highest = max(highest, course)
        elif event.kind in ("segment_free", "segment_unmap"):
            course -= event.size
    start = end_bytes - course
    return start, start + highest


def _choose_device(traces: Sequence[Any], device: int | None) -> int:
    if not all(isinstance(trace, list) for trace in traces):
        raise TraceFormatError("'device_traces' must be a list of lists")
    if device is not None:
        if not 0 <= device < len(traces):
            raise TraceFormatError(f"it has no device {device}, only {len(traces)} device(s)")
        return device
    if not any(traces):
        raise TraceFormatError(f"it has no recorded events; {_RECORD}")
    return max(range(len(traces)), key=lambda number: (len(traces[number]), -number))


def _segment(entry: Mapping[str, Any], device: int) -> RecordedSegment | None:
    if entry.get("device", 0) != device:
        return None
    address = whole_number(entry.get("address"), "a segment's address")
    cursor, live = address, []
    for block in _list(entry.get("blocks"), "a segment's blocks"):
        block = _mapping(block, "a block")
        size = whole_number(block.get("size"), "a block's size", at_least=1)
        start = whole_number(block.get("address", cursor), "a block's address")  # absent before 2.1
        if block.get("state") != "inactive":
            live.append((start, size))
        cursor = start + size
    return RecordedSegment(
        address=address,
        size=whole_number(entry.get("total_size"), "a segment's size", at_least=1),
        stream=whole_number(entry.get("stream", 0), "a segment's stream"),
        small=entry.get("segment_type") == "small",
        expandable=bool(entry.get("is_expandable", False)),
        pool_id=_pool_id(entry.get("segment_pool_id")) or DEFAULT_POOL,
        blocks=tuple(live),
    )


def _events(entries: Sequence[Any], final: Sequence[RecordedSegment]) -> tuple[TraceEvent, ...]:
    private = _PrivatePools(final)
    events: list[TraceEvent] = []
    for index, entry in enumerate(entries):
        entry = _mapping(entry, f"event {index}")
        kind = _KINDS.get(entry.get("action", ""))
        if kind is None:  # "snapshot", annotations, and what later versions may add
            continue
        event = _event(entry, kind, index, private)
        before = events[-1] if events else None
        if (
            kind == "free_completed"
            and before is not None
            and (before.kind, before.address) == ("free_requested", event.address)
        ):
            events.pop()
            event = event._replace(kind="free")
        events.append(event)
    return tuple(_without_completions(events))


def _event(
    entry: Mapping[str, Any], kind: EventKind, index: int, private: _PrivatePools
) -> TraceEvent:
    address = 0
    if kind != "oom":  # an out-of-memory has no address
        address = whole_number(entry.get("addr"), f"event {index}'s addr")
    frames = entry.get("frames") or ()
    return TraceEvent(
        kind,
        address,
        whole_number(entry.get("size"), f"event {index}'s size"),
        whole_number(entry.get("stream", 0), f"event {index}'s stream"),
        _pool_id(entry.get("pool_id")) or private.of(address),
        index,
        kind in ("segment_free", "segment_unmap") and _asked_by_user(frames),
    )


def _without_completions(events: list[TraceEvent]) -> list[TraceEvent]:
    """Take requests for completions where a history was told not to record completions."""
    if any(event.kind in ("free", "free_completed") for event in events):
        return events
    return [e._replace(kind="free") if e.kind == "free_requested" else e for e in events]


def _asked_by_user(frames: Any) -> bool:
    return isinstance(frames, list | tuple) and any(
        isinstance(frame, dict) and frame.get("name") in ("empty_cache", "emptyCache")
        for frame in frames
    )


class _PrivatePools:
    """Which private pool an address belongs to, for versions whose events do not say."""

    def __init__(self, final: Sequence[RecordedSegment]) -> None:
        self._segments = [s for s in final if s.pool_id != DEFAULT_POOL]  # by address already
        self._starts = [segment.address for segment in self._segments]

    def of(self, address: int) -> PoolId:
        if not self._segments:
            return DEFAULT_POOL
        place = bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._segments[place].end:
            return DEFAULT_POOL
        return self._segments[place].pool_id


def _pool_id(value: Any) -> PoolId | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise TraceFormatError(f"a pool id must be a pair of numbers, not {value!r:.40}")
    return whole_number(value[0], "a pool id"), whole_number(value[1], "a pool id")


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TraceFormatError(f"{what} is a {type(value).__name__}, not a dict")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TraceFormatError(f"{what} is a {type(value).__name__}, not a list")
    return list(value)
