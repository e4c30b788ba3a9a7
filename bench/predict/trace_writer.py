"""A trace reduced to numbers, as ``bench.predict.reduced_trace`` reads it: small enough to keep.

Names, stacks and times are left out, and addresses are kept: a replay must give the same ones.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.errors import MembenchError
from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import DEFAULT_POOL
from bench.predict.trace import Trace, TraceEvent

__all__ = ["reduce_trace", "write_reduced_trace"]


def reduce_trace(trace: Trace, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the trace as JSON-ready data; ``about`` is put in front, as ``{"source": ...}``.

    A free that another stream delayed stands where it was completed.
    Raises MembenchError for a trace of private pools, of which the form has no word, or of
    settings that it cannot name.
    """
    if any(event.pool_id != DEFAULT_POOL for event in trace.events):
        raise MembenchError(
            "a trace with private memory pools cannot be reduced: keep the snapshot"
        )
    events = [row for event in trace.events if (row := _row(event)) is not None]
    blocks = [list(block) for segment in trace.segments for block in segment.blocks]
    return {
        **(about or {}),
        "settings": _settings(trace.settings),
        "segments_at_start": [
            [s.address, s.size, s.stream, "small" if s.small else "large", s.expandable]
            for s in trace.segments
        ],
        "blocks_at_start": blocks,
        "events": events,
        "expected": {
            "reserved_at_start_bytes": trace.reserved_start_bytes,
            "peak_reserved_bytes": trace.reserved_peak_bytes,
            "final_reserved_bytes": trace.reserved_end_bytes,
            "final_segments": [[address] for address in sorted(trace.end_addresses)],
        },
    }


def _row(event: TraceEvent) -> list[Any] | None:
    if event.kind == "free_requested":
        return None
    if event.kind in ("free", "free_completed"):
        return ["free", event.address]
    return [event.kind, event.address, event.size, event.stream]


def _settings(settings: AllocatorSettings) -> dict[str, Any]:
    plain = AllocatorSettings(expandable_segments=settings.expandable_segments)
    if settings != plain:
        raise MembenchError(
            "a trace with allocator settings other than expandable_segments cannot be reduced: "
            "keep the snapshot"
        )
    return {"expandable_segments": settings.expandable_segments}


def write_reduced_trace(path: Path, trace: Trace, about: Mapping[str, Any] | None = None) -> None:
    """Write the trace as gzipped JSON; equal traces give equal files.

    Raises MembenchError where it cannot be reduced or written.
    """
    text = json.dumps(reduce_trace(trace, about), separators=(",", ":"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    except OSError as error:
        raise MembenchError(f"cannot write {path}: {error.strerror or error}") from None
