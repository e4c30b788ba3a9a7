"""A predicted run as Chrome's trace events, which Perfetto and chrome://tracing show.

Counters: allocated bytes by category, and reserved bytes, after each thing that the allocator did.
Slices: the phases, and within them the operators, each as long as it allocates and frees. A trace
has no time: one entry of the allocator's is one microsecond. Source of the form: the document
"Trace Event Format" of the Catapult project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any, get_args

from bench.export.recording import Entry, Recording
from bench.predict.step_trace import Trace
from bench.record import Category

__all__ = ["chrome_trace"]

_PID = 1
_PHASES_TID, _OPERATORS_TID = 1, 2


def chrome_trace(recording: Recording, trace: Trace, about: dict[str, Any]) -> dict[str, Any]:
    """Return the trace as JSON-ready data; ``about`` says what it is of."""
    return {
        "traceEvents": [
            *_names(str(about.get("case", "membench"))),
            *_phases(recording),
            *_operators(recording, trace),
            *_counters(recording, trace),
        ],
        "displayTimeUnit": "ms",
        "otherData": {**about, "time": "one microsecond for each entry: a trace has no time"},
    }


def _names(process: str) -> Iterator[dict[str, Any]]:
    yield _meta("process_name", 0, process)
    yield _meta("thread_name", _PHASES_TID, "phases")
    yield _meta("thread_name", _OPERATORS_TID, "operators that allocate")


def _meta(kind: str, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PID, "tid": tid, "ts": 0, "args": {"name": name}}


def _phases(recording: Recording) -> Iterator[dict[str, Any]]:
    ends = [first for first, _ in recording.phases[1:]] + [len(recording.entries)]
    for (first, name), end in zip(recording.phases, ends, strict=True):
        if end > first:
            yield _slice(name, "phase", _PHASES_TID, first, end - first, {})


def _operators(recording: Recording, trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield a slice for each stretch of entries of one site, which are an operator's."""
    allocations = [
        (number, entry) for number, entry in enumerate(recording.entries) if entry.action == "alloc"
    ]
    for site, group in groupby(allocations, key=lambda item: trace.sites[item[1].identity]):
        items = list(group)
        first, last = items[0][0], items[-1][0]
        arguments = {
            "module": site.module,
            "source_line": site.source_line,
            "allocated_bytes": sum(entry.block_bytes for _, entry in items),
            "requested_bytes": sum(entry.size for _, entry in items),
        }
        length = last - first + 1
        yield _slice(site.operator, "operator", _OPERATORS_TID, first, length, arguments)


def _slice(
    name: str, category: str, tid: int, begin: int, length: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": _PID,
        "tid": tid,
        "ts": begin,
        "dur": length,
        "args": arguments,
    }


def _counters(recording: Recording, trace: Trace) -> Iterator[dict[str, Any]]:
    held: Counter[str] = Counter(dict.fromkeys(get_args(Category), 0))
    reserved = -1
    for number, entry in enumerate(recording.entries):
        change = _change_bytes(entry)
        if change:
            held[trace.categories[entry.identity]] += change
            yield _counter("allocated bytes", number, dict(held))
        if entry.reserved_bytes != reserved:
            reserved = entry.reserved_bytes
            yield _counter("reserved bytes", number, {"reserved": reserved})


def _change_bytes(entry: Entry) -> int:
    if entry.action == "alloc":
        return entry.block_bytes
    return -entry.block_bytes if entry.action == "free_requested" else 0


def _counter(name: str, ts: int, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": _PID, "tid": 0, "ts": ts, "args": values}
