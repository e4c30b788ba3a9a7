"""The state at a trace's start, which no snapshot holds.

It follows by running the events backwards from the segments at the end: an alloc removes a
block, a completed free adds one, a new segment is removed, a freed one is added. Sizes of blocks
that were freed are known only as they were asked for; what they were charged is settled after.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import LARGEST_SMALL_BYTES, PoolId, round_size
from bench.predict.trace import AddressUse, RecordedSegment, TraceEvent
from bench.units import MIB

__all__ = ["settle_blocks", "state_at_start"]

_SMALL_SEGMENT_BYTES = 2 * MIB  # no large segment is that small
_LARGEST_SLACK_BYTES = LARGEST_SMALL_BYTES  # what a large block may keep without being split
_MAX_REPAIRS = 256  # each looks at every block alive
_RELEASES = ("segment_free", "segment_unmap")
_Key = tuple[int, bool, PoolId]  # stream, small, pool


def state_at_start(
    final: Sequence[RecordedSegment],
    events: Sequence[TraceEvent],
    settings: AllocatorSettings,
) -> tuple[RecordedSegment, ...]:
    """Return the segments and live blocks before the first event.

    A damaged event (an address where nothing lived) is mended by a block of its size that
    nothing else accounts for.
    """
    rewind = _Rewind(final, events, settings)
    for number in range(len(events) - 1, -1, -1):
        rewind.undo(events[number], number)
    return settle_blocks(rewind.segments(), events, settings)


class _Rewind:
    def __init__(
        self,
        final: Sequence[RecordedSegment],
        events: Sequence[TraceEvent],
        settings: AllocatorSettings,
    ) -> None:
        self.settings = settings
        self.live = {address: size for segment in final for address, size in segment.blocks}
        self.plain = {s.address: s for s in final if not s.expandable}
        self.pages: dict[_Key, list[list[int]]] = {}  # mapped [start, end) by pool
        self.repairs = 0
        self._addresses = AddressUse(events)
        self._page_classes = _PageClasses(final, events, settings)
        for segment in final:
            if segment.expandable:
                key = (segment.stream, segment.small, segment.pool_id)
                _add(self.pages.setdefault(key, []), segment.address, segment.end)

    def undo(self, event: TraceEvent, number: int) -> None:
        """Go back before ``event``, the trace's event ``number``."""
        match event.kind:
            case "alloc":
                self._remove_block(event, number)
            case "free" | "free_completed":
                if event.size:
                    self.live[event.address] = round_size(event.size, self.settings)
            case "segment_alloc":
                self.plain.pop(event.address, None)
            case "segment_free":
                self.plain[event.address] = RecordedSegment(
                    address=event.address,
                    size=event.size,
                    stream=event.stream,
                    small=event.size <= _SMALL_SEGMENT_BYTES,
                    pool_id=event.pool_id,
                )
            case "segment_map":
                pages = self.pages.get(self._key(event, number), [])
                _subtract(pages, event.address, event.address + event.size)
            case "segment_unmap":
                pages = self.pages.setdefault(self._key(event, number), [])
                _add(pages, event.address, event.address + event.size)

    def _remove_block(self, event: TraceEvent, number: int) -> None:
        if self.live.pop(event.address, None) is not None or not event.size:
            return
        self.repairs += 1
        if self.repairs > _MAX_REPAIRS:
            return
        # The block that was meant has no allocation of its own: the last use of its address was a
        # free, or it had none.
        rounded = round_size(event.size, self.settings)
        alike = [
            (last_is_free is None, abs(address - event.address), address)
            for address, size in self.live.items()
            if 0 <= size - rounded <= _LARGEST_SLACK_BYTES
            and (last_is_free := self._addresses.last_is_free(address, number)) is not False
        ]
        if alike:
            del self.live[min(alike)[2]]

    def _key(self, event: TraceEvent, number: int) -> _Key:
        """Say which pool pages belong to: the events do not tell small from large."""
        if event.kind == "segment_map":  # a small request maps one small page, never more
            small = event.size == _SMALL_SEGMENT_BYTES
        else:
            small = self._page_classes.were_small(event, number)
        return event.stream, small, event.pool_id

    def segments(self) -> tuple[RecordedSegment, ...]:
        """Return the state as it stands; what overlaps through damaged events is left out."""
        found = list(self.plain.values())
        for (stream, small, pool_id), stretches in self.pages.items():
            found += [
                RecordedSegment(
                    address=start,
                    size=end - start,
                    stream=stream,
                    small=small,
                    expandable=True,
                    pool_id=pool_id,
                )
                for start, end in stretches
            ]
        found.sort(key=lambda segment: segment.address)
        return tuple(_filled(found, sorted(self.live.items())))


def _filled(
    segments: Iterable[RecordedSegment], blocks: Sequence[tuple[int, int]]
) -> list[RecordedSegment]:
    """Put the blocks into the segments that hold them."""
    filled: list[RecordedSegment] = []
    starts = [address for address, _ in blocks]
    end = 0
    for segment in segments:
        if segment.address < end:
            continue
        end = cursor = segment.address
        inside = []
        for place in range(bisect_left(starts, segment.address), len(blocks)):
            address, size = blocks[place]
            if address >= segment.end:
                break
            if address >= cursor and address + size <= segment.end:
                inside.append((address, size))
                cursor = address + size
        end = segment.end
        filled.append(replace(segment, blocks=tuple(inside)))
    return filled


class _PageClasses:
    """Whether pages are small or large ones, as far as the trace shows it."""

    def __init__(
        self,
        final: Sequence[RecordedSegment],
        events: Sequence[TraceEvent],
        settings: AllocatorSettings,
    ) -> None:
        self._events = events
        self._large_page = settings.large_segment_size_bytes
        self._maps = [(n, event) for n, event in enumerate(events) if event.kind == "segment_map"]
        self._ranges = [segment for segment in final if segment.expandable]
        kinds = ("alloc", "free", "free_completed") if self._maps or self._ranges else ()
        self._uses = sorted(
            (event.address, n, event.size <= LARGEST_SMALL_BYTES)
            for n, event in enumerate(events)
            if event.kind in kinds and event.size
        )

    def were_small(self, event: TraceEvent, number: int) -> bool:
        """Whether the pages that event ``number`` unmaps were small ones.

        They were as when they were mapped; if that was before the trace, as the blocks that lived
        in them; if none did, as the order of the release says; if it says nothing, as the nearest
        pages known, since each pool's pages lie in one long stretch of addresses.
        """
        shown = self._shown(event, number)
        if shown is None:
            shown = self._by_order(event, number)
        return self._as_nearest(event) if shown is None else shown

    def _shown(self, event: TraceEvent, number: int) -> bool | None:
        """Tell by the size, by the pages as they were mapped, or by the blocks in them."""
        if event.size % self._large_page:
            return True
        for mapped_at, one in reversed(self._maps):
            if mapped_at < number and _covers(one, event.address) and _same_owner(one, event):
                return one.size == _SMALL_SEGMENT_BYTES
        first = bisect_left(self._uses, (event.address,))
        last = bisect_left(self._uses, (event.address + event.size,))
        before = [(n, small) for _, n, small in self._uses[first:last] if n < number]
        return max(before)[1] if before else None

    def _by_order(self, event: TraceEvent, number: int) -> bool | None:
        """Tell by the order in which a cache is emptied: a pool's large pages, then its small ones.

        Within each, blocks go by stream and size, of which the whole pages are all but two at most.
        """
        for _, other_number in self._same_release(event, number, -1):
            if self._shown(self._events[other_number], other_number):
                return True
        for other, other_number in self._same_release(event, number, 1):
            small = self._shown(other, other_number)
            if small is False:
                return False
            if small:
                follows = (other.stream, other.size + 2 * _SMALL_SEGMENT_BYTES)
                return False if (event.stream, event.size) >= follows else None
        return None

    def _same_release(
        self, event: TraceEvent, number: int, step: int
    ) -> Iterator[tuple[TraceEvent, int]]:
        """Yield what the pool unmapped in the same go, from ``number`` on in one direction."""
        place = number + step
        while 0 <= place < len(self._events) and self._events[place].kind in _RELEASES:
            other = self._events[place]
            if other.kind == "segment_unmap" and other.pool_id == event.pool_id:
                yield other, place
            place += step

    def _as_nearest(self, event: TraceEvent) -> bool:
        known = [
            (abs(segment.address - event.address), segment.small)
            for segment in self._ranges
            if (segment.stream, segment.pool_id) == (event.stream, event.pool_id)
        ]
        known += [
            (abs(one.address - event.address), one.size == _SMALL_SEGMENT_BYTES)
            for _, one in self._maps
            if _same_owner(one, event)
        ]
        return min(known)[1] if known else False


def _covers(one: TraceEvent, address: int) -> bool:
    return one.address <= address < one.address + one.size


def _same_owner(one: TraceEvent, other: TraceEvent) -> bool:
    return (one.stream, one.pool_id) == (other.stream, other.pool_id)


def _add(stretches: list[list[int]], start: int, end: int) -> None:
    """Add [start, end) to sorted disjoint stretches, joining those that touch."""
    first = bisect_left(stretches, start, key=lambda stretch: stretch[1])
    last = bisect_right(stretches, end, key=lambda stretch: stretch[0])
    if first < last:
        start = min(start, stretches[first][0])
        end = max(end, stretches[last - 1][1])
    stretches[first:last] = [[start, end]]


def _subtract(stretches: list[list[int]], start: int, end: int) -> None:
    """Take [start, end) out of sorted disjoint stretches."""
    first = bisect_right(stretches, start, key=lambda stretch: stretch[1])
    last = bisect_left(stretches, end, key=lambda stretch: stretch[0])
    left = []
    for old_start, old_end in stretches[first:last]:
        if old_start < start:
            left.append([old_start, start])
        if old_end > end:
            left.append([end, old_end])
    stretches[first:last] = left


def settle_blocks(
    segments: Sequence[RecordedSegment],
    events: Sequence[TraceEvent],
    settings: AllocatorSettings,
) -> tuple[RecordedSegment, ...]:
    """Give each block of a plain large segment the bytes it was charged beyond its request.

    A large block keeps up to 1 MiB rather than be split, and everything free in the large pool is
    larger than that: so a gap of up to 1 MiB belongs to the block before it. Of a longer gap, the
    part before the first block that the trace puts there does. A block of ``max_split_size`` or
    more is never split: it has its segment to itself.
    """
    hints = _first_blocks_in_gaps(segments, events)
    return tuple(
        segment
        if segment.small or segment.expandable or not segment.blocks
        else replace(segment, blocks=_settled(segment, hints, settings))
        for segment in segments
    )


def _settled(
    segment: RecordedSegment, hints: dict[int, int], settings: AllocatorSettings
) -> tuple[tuple[int, int], ...]:
    largest_split = settings.max_split_size_bytes
    if largest_split is not None and segment.blocks[0][1] >= largest_split:
        return ((segment.address, segment.size),)
    settled = []
    ends = [*(address for address, _ in segment.blocks[1:]), segment.end]
    for (address, size), gap_end in zip(segment.blocks, ends, strict=True):
        slack = min(gap_end, hints.get(address + size, gap_end)) - (address + size)
        settled.append((address, size + slack if slack <= _LARGEST_SLACK_BYTES else size))
    return tuple(settled)


def _first_blocks_in_gaps(
    segments: Sequence[RecordedSegment], events: Sequence[TraceEvent]
) -> dict[int, int]:
    """Return gap start -> address of the first block put into the gap while it stands.

    Best fit hands out the front of a free block, so the first block marks where it starts.
    """
    gaps: list[tuple[int, int]] = []
    owner: dict[int, int] = {}  # address of the block before -> its gap's start
    for segment in segments:
        if segment.small or segment.expandable:
            continue
        ends = [*(address for address, _ in segment.blocks[1:]), segment.end]
        for (address, size), gap_end in zip(segment.blocks, ends, strict=bool(segment.blocks)):
            if gap_end - address - size > _LARGEST_SLACK_BYTES:
                gaps.append((address + size, gap_end))
                owner[address] = address + size
    starts = [start for start, _ in gaps]
    open_gaps = set(starts)
    first: dict[int, int] = {}
    for event in events:
        if not open_gaps:
            break
        if event.kind == "alloc":
            place = bisect_right(starts, event.address) - 1
            if place >= 0 and event.address < gaps[place][1] and starts[place] in open_gaps:
                open_gaps.discard(starts[place])
                first[starts[place]] = event.address
        elif event.kind in ("free", "free_completed"):
            open_gaps.discard(owner.get(event.address, -1))
    return first
