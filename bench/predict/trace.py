"""A recorded memory trace, as the replay wants it, whatever file it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import DEFAULT_POOL, PoolId

__all__ = [
    "EventKind",
    "RecordedSegment",
    "Trace",
    "TraceEvent",
    "TraceFormatError",
    "checked_segments",
    "whole_number",
]

EventKind = Literal[
    "alloc",
    "free",  # asked for and done at once
    "free_requested",  # asked for; another stream still uses the block
    "free_completed",  # done, some time after it was asked for
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "oom",  # size: what was asked for in vain
]

_LARGEST = 1 << 62


class TraceFormatError(Exception):
    """What in a file's data does not make a trace."""


class TraceEvent(NamedTuple):
    """One thing the allocator did. ``index`` is its place in the file's own list."""

    kind: EventKind
    address: int
    size: int
    stream: int
    pool_id: PoolId
    index: int
    by_user: bool = False  # a release that empty_cache is known to have asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSegment:
    """A segment, or a mapped stretch of an expandable one, and the blocks that live in it.

    ``blocks`` are (address, size), ascending; the gaps between them are free.
    """

    address: int
    size: int
    stream: int
    small: bool
    expandable: bool = False
    pool_id: PoolId = DEFAULT_POOL
    blocks: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.address + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A device's trace: the state at its start, what happened, and the reserved bytes recorded."""

    device: int
    settings: AllocatorSettings
    segments: tuple[RecordedSegment, ...]  # at the start
    events: tuple[TraceEvent, ...]
    reserved_start_bytes: int
    reserved_peak_bytes: int
    reserved_end_bytes: int


def whole_number(value: Any, what: str, *, at_least: int = 0) -> int:
    """Return ``value`` if it is an int that can be an address or a size.

    Errors: TraceFormatError naming ``what``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < _LARGEST:
        text = repr(value)
        shown = text if len(text) < 40 else text[:40] + "..."
        raise TraceFormatError(f"{what} is {shown}, not a number of bytes or an address")
    return value


def checked_segments(segments: Iterable[RecordedSegment]) -> tuple[RecordedSegment, ...]:
    """Return the segments by address.

    Errors: TraceFormatError when two overlap, or blocks overlap or leave their segment.
    """
    ordered = tuple(sorted(segments, key=lambda segment: segment.address))
    for one, other in pairwise(ordered):
        if one.end > other.address:
            raise TraceFormatError(f"its segments at {one.address} and {other.address} overlap")
    for segment in ordered:
        _check_blocks(segment, segment.blocks)
    return ordered


def _check_blocks(segment: RecordedSegment, blocks: Sequence[tuple[int, int]]) -> None:
    cursor = segment.address
    for address, size in blocks:
        if address < cursor or address + size > segment.end:
            raise TraceFormatError(f"its block at {address} overlaps another or leaves its segment")
        cursor = address + size
