"""A recorded memory trace, as the replay wants it, whatever file it came from."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import DEFAULT_POOL, PoolId

__all__ = [
    "AddressUse",
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
    """One thing the allocator did. ``place`` is its place in the file's own list of events."""

    kind: EventKind
    address: int
    size: int
    stream: int
    pool_id: PoolId
    place: int
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
    """A device's trace: the state at its start, what happened, and the reserved bytes recorded.

    ``definition``: that of the case, where the file holds one, as ``Case.to_definition`` gives it.
    """

    device: int
    settings: AllocatorSettings
    segments: tuple[RecordedSegment, ...]  # at the start
    events: tuple[TraceEvent, ...]
    reserved_start_bytes: int
    reserved_peak_bytes: int
    reserved_end_bytes: int
    end_addresses: frozenset[int] = frozenset()  # of the segments at the end, where recorded
    definition: Mapping[str, Any] = field(default_factory=dict)


class AddressUse:
    """When blocks at an address are allocated and freed, which take turns in an undamaged trace."""

    def __init__(self, events: Sequence[TraceEvent]) -> None:
        self._places: dict[int, list[int]] = {}
        self._frees = set()
        for number, event in enumerate(events):
            if event.kind in ("alloc", "free", "free_completed"):
                self._places.setdefault(event.address, []).append(number)
                if event.kind != "alloc":
                    self._frees.add(number)

    def next_is_free(self, address: int, number: int) -> bool:
        """Whether the first use of ``address`` after event ``number`` is a free."""
        following = self._following(address, number)
        return following is not None and following in self._frees

    def next_is_alloc(self, address: int, number: int) -> bool:
        """Whether the first use of ``address`` after event ``number`` is an allocation."""
        following = self._following(address, number)
        return following is not None and following not in self._frees

    def _following(self, address: int, number: int) -> int | None:
        places = self._places.get(address, ())
        following = bisect_right(places, number)
        return places[following] if following < len(places) else None

    def last_is_free(self, address: int, number: int) -> bool | None:
        """Whether the last use of ``address`` before event ``number`` is a free; None: none."""
        places = self._places.get(address, ())
        before = bisect_left(places, number) - 1
        return places[before] in self._frees if before >= 0 else None


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
