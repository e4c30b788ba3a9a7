"""Replay a recorded trace through the allocator simulator and compare.

The simulator is fed what the program did (allocations, frees, emptied caches) and is told the
address of each new segment, so that ties break as they did. It is right when every allocation
falls on the recorded address and the reserved bytes agree at start, peak and end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.predict.allocator import (
    DEFAULT_POOL,
    Block,
    CachingAllocator,
    OutOfMemory,
    PoolId,
    PoolName,
    restore_range,
    restore_segment,
)
from bench.predict.trace import RecordedSegment, Trace, TraceEvent
from bench.units import GIB, MIB

__all__ = ["ReplayResult", "fit", "replay"]

_NEW = frozenset({"segment_alloc", "segment_map"})
_RELEASE = frozenset({"segment_free", "segment_unmap"})
_RANGE_BYTES = 1 << 44  # of an expandable segment; no card is larger, and it need not be exact
_SMALL_SEGMENT_BYTES = 2 * MIB
_MAX_REPAIRS = 256  # frees of unknown addresses that are looked into, each at the cost of a search


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What a replay gave. ``fits`` is None where no capacity was asked about.

    ``oom_at_event`` is the place in the file's list of events at which the run at the capacity
    asked about ran out of memory, 0 where already the state at the start is too large.
    """

    allocations: int
    addresses_exact: int
    reserved_start_bytes: int
    reserved_peak_bytes: int
    reserved_end_bytes: int
    recorded_reserved_start_bytes: int
    recorded_reserved_peak_bytes: int
    recorded_reserved_end_bytes: int
    fits: bool | None = None
    oom_at_event: int | None = None

    @property
    def exact(self) -> bool:
        """Whether every address and all three reserved figures agree."""
        return (
            self.addresses_exact == self.allocations
            and self.reserved_start_bytes == self.recorded_reserved_start_bytes
            and self.reserved_peak_bytes == self.recorded_reserved_peak_bytes
            and self.reserved_end_bytes == self.recorded_reserved_end_bytes
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON; ``fits`` and ``oom_at_event`` only if asked about."""
        data = asdict(self)
        if self.fits is None:
            del data["fits"], data["oom_at_event"]
        return data


def replay(trace: Trace, capacity_bytes: int | None = None) -> ReplayResult:
    """Replay ``trace`` as it was recorded and, where given, at ``capacity_bytes``."""
    replayer = _Replayer(trace)
    start = replayer.allocator.reserved_bytes
    replayer.run()
    allocator = replayer.allocator
    fits, oom_at_event = (None, None) if capacity_bytes is None else fit(trace, capacity_bytes)
    return ReplayResult(
        allocations=replayer.allocations,
        addresses_exact=replayer.exact,
        reserved_start_bytes=start,
        reserved_peak_bytes=allocator.reserved_peak_bytes,
        reserved_end_bytes=allocator.reserved_bytes,
        recorded_reserved_start_bytes=trace.reserved_start_bytes,
        recorded_reserved_peak_bytes=trace.reserved_peak_bytes,
        recorded_reserved_end_bytes=trace.reserved_end_bytes,
        fits=fits,
        oom_at_event=oom_at_event,
    )


class _LiveBlocks:
    """Blocks by the address the trace knows them by, which a wrong event may share or miss."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[Block | None]] = {}
        self._repairs = 0

    def add(self, address: int, block: Block | None) -> None:
        self._blocks.setdefault(address, []).append(block)

    def take(self, address: int) -> Block | None:
        """Return the block to free; where nothing lives at ``address``, the nearest one."""
        if address not in self._blocks:
            self._repairs += 1
            if not self._blocks or self._repairs > _MAX_REPAIRS:
                return None
            address = min(self._blocks, key=lambda known: abs(known - address))
        sharing = self._blocks[address]
        own = [place for place, b in enumerate(sharing) if b is not None and b.address == address]
        block = sharing.pop(own[-1] if own else -1)
        if not sharing:
            del self._blocks[address]
        return block


class _Replayer:
    """One pass over a trace, at the addresses it recorded and without a capacity."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.allocations = self.exact = 0
        self.allocator = CachingAllocator(
            None,
            trace.settings,
            device_total_bytes=_RANGE_BYTES,
            place_segment=self._place,
        )
        self.allocator.allowed_bytes = None  # garbage collection is an input here, like any release
        self.live = _LiveBlocks()
        for address, block in _load(self.allocator, trace):
            self.live.add(address, block)
        self.allocator.reset_peaks()
        self._made_up = _above_all(trace)
        self._known_starts = {s.address for s in trace.segments} | {
            event.address for event in trace.events if event.kind == "segment_free"
        }
        self._expandable = _first_modes(trace)
        self._new: list[TraceEvent] = []  # segments the trace has made and no allocation used yet
        self._releases: list[TraceEvent] = []
        self._after_wait = False  # the releases followed frees that had waited for a stream
        self._partial = (
            trace.settings.max_split_size_bytes is not None
            or trace.settings.garbage_collection_threshold > 0
            or any(segment.pool_id != DEFAULT_POOL for segment in trace.segments)
            or any(event.pool_id != DEFAULT_POOL for event in trace.events)
        )

    def run(self) -> None:
        before: TraceEvent | None = None
        for event in self.trace.events:
            kind = event.kind
            if kind in _RELEASE:
                self._use_up_new()
                if not self._releases:
                    self._after_wait = before is not None and before.kind == "free_completed"
                self._releases.append(event)
            else:
                if self._releases:
                    self._release()
                if kind in _NEW:
                    self._new.append(event)
                elif kind == "alloc":
                    self._allocate(event)
                else:
                    self._use_up_new()
                    if kind in ("free", "free_completed"):
                        self.allocator.free(self.live.take(event.address))
                self._after_wait = self._after_wait and kind in _NEW
            before = event
        self._release()
        self._use_up_new()

    def _allocate(self, event: TraceEvent) -> None:
        if not event.size:
            return
        self.allocations += 1
        allocator, new = self.allocator, self._new
        if new:
            self._expandable[event.pool_id] = new[-1].kind == "segment_map"
            self._front = _likelier_start(new[0], event, self._known_starts)
        allocator.expandable = self._expandable.get(
            event.pool_id, self.trace.settings.expandable_segments
        )
        reserved = allocator.reserved_bytes
        # After a retry's wait the search is not run again, whatever the wait has set free.
        search = not (self._after_wait and new)
        try:
            block = allocator.malloc(event.size, event.stream, event.pool_id, search=search)
        except OutOfMemory:  # only for sizes beyond any card's address space
            block = None
        if allocator.reserved_bytes > reserved:
            self._new = []
        self._use_up_new()
        self.exact += block is not None and block.address == event.address
        self.live.add(event.address, block)

    def _place(self, size: int, _pool: PoolName, _stream: int) -> int:
        """Tell the simulator where the trace put the segment it is making."""
        if self._new:
            hint = self._new[0]
            free = self._front not in self.allocator.segments
            if free and (hint.kind == "segment_map" or hint.size == size):
                return self._front
        address = self._made_up
        self._made_up += -(-size // GIB) * GIB
        return address

    def _use_up_new(self) -> None:
        """Make the segments that the trace made and the simulator did not, as cache.

        So it is with pages mapped for a request that then ran out of memory.
        """
        for event in self._new:
            small = event.size <= _SMALL_SEGMENT_BYTES
            pool = self.allocator.pool(small, event.pool_id)
            if event.kind == "segment_map":
                unmapped = pool.unmapped.get(event.stream, [])
                place = bisect_right(unmapped, event.address, key=lambda item: item[0]) - 1
                if place >= 0 and unmapped[place][0] == event.address:
                    block = unmapped[place][-1]
                    self.allocator.map_pages(block, min(event.size, block.size))
            elif event.address not in self.allocator.segments:
                piece = (event.address, event.size)
                if event.size:
                    pool.add(self.allocator.add_segment(*piece, event.stream, pool))
        self._new = []

    def _release(self) -> None:
        """Give back what the trace gave back.

        Without garbage collection, oversize blocks and private pools, a release is always of the
        whole cache, and the simulator must find by itself what that is.
        """
        events, self._releases = self._releases, []
        if not events:
            return
        if not self._partial:
            self.allocator.empty_cache()
            return
        for event in events:
            if event.kind == "segment_free":
                head = self.allocator.segments.get(event.address)
                if head is not None and head.is_releasable:
                    self.allocator.release_segment(head)
            else:
                block = self.allocator.find_free(event.address, event.size)
                if block is not None:
                    self.allocator.unmap_pages(block)


def _likelier_start(new: TraceEvent, event: TraceEvent, known: set[int]) -> int:
    """Return the address of a new segment, of which its first block is the front.

    Where the two events disagree, one is damaged: a segment's address is likely to be right if it
    turns up again.
    """
    if new.address != event.address and new.address not in known and event.address in known:
        return event.address
    return new.address


def _first_modes(trace: Trace) -> dict[PoolId, bool]:
    """Return, by pool, whether segments were expandable as the trace began: it may change."""
    modes: dict[PoolId, bool] = {}
    for event in trace.events:
        if event.kind in _NEW:
            modes.setdefault(event.pool_id, event.kind == "segment_map")
    return modes


def _above_all(trace: Trace) -> int:
    highest = max((segment.end for segment in trace.segments), default=0)
    highest = max(highest, max((e.address + e.size for e in trace.events), default=0))
    return -(-highest // GIB) * GIB + _RANGE_BYTES


def _load(allocator: CachingAllocator, trace: Trace) -> list[tuple[int, Block]]:
    """Put the state at the trace's start into the allocator; return its live blocks."""
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
    for base, stretches in _address_spaces(trace):
        first = stretches[0]
        blocks += restore_range(
            allocator,
            (base, _range_bytes(trace, first, base)),
            [((s.address, s.size), s.blocks) for s in stretches],
            stream=first.stream,
            small=first.small,
            pool_id=first.pool_id,
        )
    return [(block.address, block) for block in blocks]


def _page_bytes(trace: Trace, small: bool) -> int:
    return _SMALL_SEGMENT_BYTES if small else trace.settings.large_segment_size_bytes


def _range_bytes(trace: Trace, first: RecordedSegment, base: int) -> int:
    page = _page_bytes(trace, first.small)
    longest = max(_RANGE_BYTES, max(s.end for s in trace.segments) - base)
    return -(-longest // page) * page


def _address_spaces(trace: Trace) -> list[tuple[int, list[RecordedSegment]]]:
    """Group mapped stretches into expandable segments; return (base, stretches) of each.

    Stretches of one pool and stream share a segment if whole pages lie between them and nothing
    else does. Pages mapped later, below the first stretch, say that the segment starts lower.
    """
    groups: list[tuple[int, list[RecordedSegment]]] = []
    ordered = list(trace.segments)
    for place, segment in enumerate(ordered):
        if not segment.expandable:
            continue
        page = _page_bytes(trace, segment.small)
        before = ordered[place - 1] if place else None
        if before is not None and before.expandable and _same_pool(before, segment):
            base, stretches = groups[-1]
            if (segment.address - base) % page == 0:
                stretches.append(segment)
                continue
        floor = before.end if before is not None else 0
        groups.append((_lowest_page(trace.events, segment, floor, page), [segment]))
    return groups


def _same_pool(one: RecordedSegment, other: RecordedSegment) -> bool:
    return (one.stream, one.small, one.pool_id) == (other.stream, other.small, other.pool_id)


def _lowest_page(
    events: Sequence[TraceEvent], segment: RecordedSegment, floor: int, page: int
) -> int:
    lowest = segment.address
    for event in events:
        if (
            event.kind == "segment_map"
            and floor <= event.address < lowest
            and (event.stream, event.pool_id) == (segment.stream, segment.pool_id)
            and (event.size == _SMALL_SEGMENT_BYTES) == segment.small
            and (segment.address - event.address) % page == 0
        ):
            lowest = event.address
    return lowest


def fit(trace: Trace, capacity_bytes: int) -> tuple[bool, int | None]:
    """Return whether the traced run completes at ``capacity_bytes``, and if not, at which event.

    The state at the start is included, at its recorded addresses; what is cached of it is given
    back first if it must be. A request that ran out of memory when recorded has to fit too, and
    is then taken to be freed at once. Caches emptied by the program are emptied here; releases
    under pressure are the simulator's own.
    """
    made_up = [_above_all(trace)]

    def place(size: int, _pool: PoolName, _stream: int) -> int:
        made_up[0] += -(-size // GIB) * GIB
        return made_up[0]

    allocator = CachingAllocator(capacity_bytes, trace.settings, place_segment=place)
    live = _LiveBlocks()
    for address, block in _load(allocator, trace):
        live.add(address, block)
    if allocator.reserved_bytes > capacity_bytes:
        allocator.empty_cache()
    if allocator.reserved_bytes > capacity_bytes:
        return False, 0
    modes = _first_modes(trace)
    emptied = _emptied_by_program(trace)
    for place_in_trace, event in enumerate(trace.events):
        kind = event.kind
        try:
            if kind == "alloc" or kind == "oom":
                allocator.expandable = modes.get(
                    event.pool_id, trace.settings.expandable_segments
                )
                new = allocator.malloc(event.size, event.stream, event.pool_id)
                if kind == "alloc":
                    live.add(event.address, new)
                else:
                    allocator.free(new)
            elif kind == "free" or kind == "free_completed":
                _free(allocator, live.take(event.address))
            elif kind in _NEW:
                modes[event.pool_id] = kind == "segment_map"
            elif place_in_trace in emptied:
                allocator.empty_cache()
        except OutOfMemory:
            return False, event.index
    return True, None


def _free(allocator: CachingAllocator, block: Block | None) -> None:
    allocator.free(block)


def _emptied_by_program(trace: Trace) -> set[int]:
    """Return the places in the trace's events at which the program emptied the cache.

    A run of releases is the program's unless a new segment or an out-of-memory follows at once,
    as it does when the allocator makes room; even then if the trace holds a stack that says so,
    or if so much had been reserved at another time that memory cannot have run out.
    """
    emptied: set[int] = set()
    reserved = trace.reserved_start_bytes
    begun: int | None = None
    before = reserved
    for place, event in enumerate(trace.events):
        if event.kind in _RELEASE:
            if begun is None:
                begun, before = place, reserved
            reserved -= event.size
            continue
        if begun is not None:
            pressed = event.kind in _NEW and before + event.size > trace.reserved_peak_bytes
            said = any(e.by_user for e in trace.events[begun:place])
            if said or not (pressed or event.kind == "oom"):
                emptied.add(begun)
            begun = None
        if event.kind in _NEW:
            reserved += event.size
    if begun is not None:
        emptied.add(begun)
    return emptied
