"""Put an allocator into the state that a trace starts from, and keep track of its blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from bench.predict.allocator import (
    Block,
    CachingAllocator,
    PoolId,
    restore_range,
    restore_segment,
)
from bench.predict.trace import RecordedSegment, Trace, TraceEvent
from bench.units import GIB, MIB

__all__ = ["LiveBlocks", "Placement", "first_modes", "restore_state"]

_RANGE_BYTES = 1 << 44  # of an expandable segment: more than any card's, and it need not be exact
_SMALL_PAGE_BYTES = 2 * MIB
_Key = tuple[int, bool, PoolId]  # stream, small, pool


class LiveBlocks:
    """Blocks by the address at which the trace will free them."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[Block]] = {}

    def add(self, address: int, block: Block) -> None:
        """Note a block; a damaged trace may have two at one address."""
        self._blocks.setdefault(address, []).append(block)

    def take(self, address: int, *, in_place: bool = True) -> Block | None:
        """Return the block to free; None where nothing is known.

        Of several, one that really is at the address, or with ``in_place=False`` one that is not.
        """
        sharing = self._blocks.get(address)
        if sharing is None:
            return None
        block = max(sharing, key=lambda one: (one.address == address) == in_place)
        sharing.remove(block)
        if not sharing:
            del self._blocks[address]
        return block

    def take_first(self, wanted: Callable[[int, Block], bool]) -> Block | None:
        """Return the first block of which ``wanted``, given what it is known by, holds."""
        for known, sharing in self._blocks.items():
            for place, block in enumerate(sharing):
                if wanted(known, block):
                    del sharing[place]
                    if not sharing:
                        del self._blocks[known]
                    return block
        return None


def restore_state(allocator: CachingAllocator, trace: Trace) -> LiveBlocks:
    """Give a fresh allocator the segments and blocks at the trace's start; peaks start there."""
    blocks: list[Block] = []
    for segment in trace.segments:
        if not segment.expandable:
            blocks += restore_segment(
                allocator,
                (segment.address, segment.size),
                segment.blocks,
                stream=segment.stream,
                small=segment.small,
                pool_id=segment.pool_id,
            )
    highest = max((segment.end for segment in trace.segments), default=0)
    for base, stretches in _address_spaces(trace):
        first = stretches[0]
        page = _page_bytes(trace, first.small)
        blocks += restore_range(
            allocator,
            (base, -(-max(_RANGE_BYTES, highest - base) // page) * page),
            [((s.address, s.size), s.blocks) for s in stretches],
            stream=first.stream,
            small=first.small,
            pool_id=first.pool_id,
        )
    allocator.reset_peaks()
    live = LiveBlocks()
    for block in blocks:
        live.add(block.address, block)
    return live


class Placement:
    """Where segments go: where the trace put one of that size at that moment, else elsewhere.

    ``expected`` is the trace's segment event that the next new segment answers to, ``front`` its
    address.
    """

    def __init__(self, trace: Trace) -> None:
        highest = max((segment.end for segment in trace.segments), default=0)
        highest = max(highest, max((e.address + e.size for e in trace.events), default=0))
        self._above_all = -(-highest // GIB) * GIB + _RANGE_BYTES
        self.expected: TraceEvent | None = None
        self.front = 0

    def expect(self, event: TraceEvent, front: int | None = None) -> None:
        """Note that the trace makes a segment, or maps pages, for the next allocation."""
        self.expected = event
        self.front = event.address if front is None else front

    def __call__(self, allocator: CachingAllocator, size: int) -> int:
        """Return the address for a new segment, or for the range of an expandable one."""
        event = self.expected
        free = self.front not in allocator.segments
        if event is not None and free and (event.kind == "segment_map" or event.size == size):
            return self.front
        address = self._above_all
        self._above_all += -(-size // GIB) * GIB
        return address


def first_modes(trace: Trace) -> dict[PoolId, bool]:
    """Return, by pool, whether new segments were expandable as the trace began: it may change."""
    modes: dict[PoolId, bool] = {}
    for event in trace.events:
        if event.kind in ("segment_alloc", "segment_map"):
            modes.setdefault(event.pool_id, event.kind == "segment_map")
    return modes


def _page_bytes(trace: Trace, small: bool) -> int:
    return _SMALL_PAGE_BYTES if small else trace.settings.large_segment_size_bytes


def _address_spaces(trace: Trace) -> list[tuple[int, list[RecordedSegment]]]:
    """Group mapped stretches into expandable segments; return (base, stretches) of each.

    Stretches of one pool and stream share a segment if whole pages lie between them and nothing
    else does. Pages mapped later, below the first stretch, say that the segment starts lower.
    """
    mapped_later = _mapped_later(trace)
    groups: list[tuple[int, list[RecordedSegment]]] = []
    before: RecordedSegment | None = None
    for segment in trace.segments:
        if segment.expandable:
            page = _page_bytes(trace, segment.small)
            joins = before is not None and before.expandable and _key(before) == _key(segment)
            if joins and (segment.address - groups[-1][0]) % page == 0:
                groups[-1][1].append(segment)
            else:
                floor = before.end if before is not None else 0
                later = mapped_later.get(_key(segment), [])
                groups.append((_lowest_page(later, floor, segment.address, page), [segment]))
        before = segment
    return groups


def _key(segment: RecordedSegment) -> _Key:
    return segment.stream, segment.small, segment.pool_id


def _mapped_later(trace: Trace) -> dict[_Key, list[int]]:
    """Return the addresses at which the trace maps pages, by pool, ascending."""
    addresses: dict[_Key, list[int]] = {}
    for event in trace.events:
        if event.kind == "segment_map":
            small = event.size == _SMALL_PAGE_BYTES
            addresses.setdefault((event.stream, small, event.pool_id), []).append(event.address)
    for pool in addresses.values():
        pool.sort()
    return addresses


def _lowest_page(mapped: list[int], floor: int, address: int, page: int) -> int:
    for place in range(bisect_left(mapped, floor), len(mapped)):
        if mapped[place] >= address:
            break
        if (address - mapped[place]) % page == 0:
            return mapped[place]
    return address
