"""Replay a recorded trace through the allocator simulator and compare.

The simulator is fed what the program did (allocations, frees, emptied caches) and is told the
address of each new segment, so that ties break as they did. It is right when every allocation
falls on the recorded address and the reserved bytes agree at start, peak and end.

A damaged trace, or a rule that the simulator lacks, costs about the allocations concerned: frees
are matched to blocks through what the rest of the trace says of an address, and once several
allocations in a row went elsewhere, the simulator follows the record (each is still counted as
missed). A program that turns expandable segments on or off as it runs costs some as well: a
history does not say when, and it shows only at the next new segment.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.predict.allocator import (
    DEFAULT_POOL,
    LARGEST_SMALL_BYTES,
    Block,
    CachingAllocator,
    OutOfMemory,
    allocate_at,
    round_size,
)
from bench.predict.fit import fit
from bench.predict.recorded_state import Placement, first_modes, restore_state
from bench.predict.trace import AddressUse, Trace, TraceEvent
from bench.units import MIB

__all__ = ["ReplayResult", "replay"]

_NEW = ("segment_alloc", "segment_map")
_RELEASES = ("segment_free", "segment_unmap")
_SMALL_SEGMENT_BYTES = 2 * MIB
_FOLLOW_AFTER = 3  # allocations missed in a row after which the record is believed
_MAX_REPAIRS = 256  # searches through all live blocks for what a damaged event meant


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


def replay(
    trace: Trace, capacity_bytes: int | None = None, device_total_bytes: int | None = None
) -> ReplayResult:
    """Replay ``trace`` as it was recorded and, where given, at ``capacity_bytes`` too.

    ``device_total_bytes``: the memory of the card whose capacity that is.
    """
    replayer = _Replayer(trace)
    start = replayer.allocator.reserved_bytes
    replayer.run()
    allocator = replayer.allocator
    fitted = None if capacity_bytes is None else fit(trace, capacity_bytes, device_total_bytes)
    return ReplayResult(
        allocations=replayer.allocations,
        addresses_exact=replayer.exact,
        reserved_start_bytes=start,
        reserved_peak_bytes=allocator.reserved_peak_bytes,
        reserved_end_bytes=allocator.reserved_bytes,
        recorded_reserved_start_bytes=trace.reserved_start_bytes,
        recorded_reserved_peak_bytes=trace.reserved_peak_bytes,
        recorded_reserved_end_bytes=trace.reserved_end_bytes,
        fits=None if fitted is None else fitted.fits,
        oom_at_event=None if fitted is None else fitted.oom_at_event,
    )


class _Replayer:
    """One pass over a trace, at the addresses it recorded and without a capacity."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.allocations = self.exact = 0
        # Without a share of the memory there is no garbage collection: when it ran is recorded.
        settings = replace(trace.settings, per_process_memory_fraction=1.0)
        self._placement = Placement(trace)
        self.allocator = CachingAllocator(
            None,
            settings,
            place_segment=lambda size, _pool, _stream: self._placement(self.allocator, size),
        )
        self.live = restore_state(self.allocator, trace)
        self._known_starts = trace.end_addresses | {
            event.address for event in trace.events if event.kind == "segment_free"
        }
        self._modes = first_modes(trace)
        self._new: list[TraceEvent] = []  # made by the trace, not yet used by an allocation
        self._releases: list[TraceEvent] = []
        self._unsearched = False  # a retry may find in the cache what its search had not
        self._may_have_waited = False
        self._partial = _releases_partially(trace)
        self._addresses = AddressUse(trace.events)
        self._lost_frees = 0  # frees that no block could be found for
        self._missed_in_a_row = 0

    def run(self) -> None:
        before: TraceEvent | None = None
        trace_refuses = self.trace.settings.max_split_size_bytes is not None
        for number, event in enumerate(self.trace.events):
            if event.kind in _RELEASES:
                self._use_up_new()
                if not self._releases:
                    last = None if before is None else before.kind
                    self._unsearched = last == "free_completed" or trace_refuses
                    # A retry's wait may have ended a free that was asked for just before.
                    self._may_have_waited = last == "free" and not event.by_user
                self._releases.append(event)
            else:
                self._release()
                if event.kind in _NEW:
                    self._new.append(event)
                else:
                    self._allocate_or_free(event, number)
                    self._unsearched = self._may_have_waited = False
            before = event
        self._release()
        self._use_up_new()

    def _allocate_or_free(self, event: TraceEvent, number: int) -> None:
        if event.kind == "alloc" and event.size:
            self.allocations += 1
            self._allocate(event, number)
            return
        self._use_up_new()
        if event.kind in ("free", "free_completed"):
            # If one more free of this address follows, that one is for the block in place.
            in_place = not self._addresses.next_is_free(event.address, number)
            block = self.live.take(event.address, in_place=in_place)
            self.allocator.free(block or self._reused_unfreed(number))

    def _reused_unfreed(self, number: int) -> Block | None:
        """Return the block that a free of an unknown address must have meant.

        It is one whose address the trace allocates again without freeing it; where there is none
        yet, it will be found once it is in the way.
        """
        self._lost_frees += 1
        if self._lost_frees > _MAX_REPAIRS:
            return None
        block = self.live.take_first(lambda known, _: self._addresses.next_is_alloc(known, number))
        self._lost_frees -= block is not None
        return block

    def _allocate(self, event: TraceEvent, number: int) -> None:
        allocator, new = self.allocator, self._new
        if number == 0 and self._take_first_segment(event):
            return
        if new:
            self._modes[event.pool_id] = new[-1].kind == "segment_map"
            self._placement.expect(new[0], _likelier_start(new[0], event, self._known_starts))
        default = self.trace.settings.expandable_segments
        allocator.expandable = self._modes.get(event.pool_id, default)
        reserved = allocator.reserved_bytes
        # A retry does not search again, whatever its wait for other streams has set free and
        # whatever its releases have made small enough for ``max_split_size``.
        search = not (
            (self._unsearched and (new or self._fills_run(event)))
            or (self._may_have_waited and new)
        )
        try:
            block = allocator.malloc(event.size, event.stream, event.pool_id, search=search)
        except OutOfMemory:  # only for sizes beyond any card's address space
            block = None
        if allocator.reserved_bytes > reserved:
            self._new = []
        self._use_up_new()
        if block is not None and block.address == event.address:
            self.exact += 1
            self._missed_in_a_row = 0
            self.live.add(event.address, block)
        else:
            self._missed_in_a_row += 1
            self._settle_miss(event, number, block)

    def _fills_run(self, event: TraceEvent) -> bool:
        """Whether a retry could have put the block there without mapping any more pages."""
        if not self.allocator.expandable:
            return False
        rounded = round_size(event.size, self.allocator.settings)
        pool = self.allocator.pool(rounded <= LARGEST_SMALL_BYTES, event.pool_id)
        run = self.allocator.lowest_run(pool, event.stream, rounded)
        return run is not None and run.address == event.address and run.size >= rounded

    def _take_first_segment(self, event: TraceEvent) -> bool:
        """Put the trace's first block into a segment that may have been made for it.

        A history cut between the two does not show that no search came before, and a search
        refuses what a new segment allows.
        """
        head = self.allocator.segments.get(event.address)
        if head is None or not head.is_releasable or head.size < event.size:
            return False
        block = self._allocate_there(event)
        if block is not None:
            self.exact += 1
            self.live.add(event.address, block)
        return block is not None

    def _settle_miss(self, event: TraceEvent, number: int, block: Block | None) -> None:
        """Go on after an allocation that fell elsewhere than recorded."""
        if block is None:
            return
        if 0 < self._lost_frees <= _MAX_REPAIRS:
            end = event.address + event.size
            in_the_way = self.live.take_first(
                lambda _, other: other.address < end and event.address < other.address + other.size
            )
            if in_the_way is not None:  # a lost free was this one's
                self._lost_frees -= 1
                self.allocator.free(in_the_way)
        freed_here = self._addresses.next_is_free(block.address, number)
        freed_there = self._addresses.next_is_free(event.address, number)
        if self._missed_in_a_row >= _FOLLOW_AFTER and freed_there and not freed_here:
            self.allocator.free(block)
            there = self._allocate_there(event)
            block = there or self.allocator.malloc(event.size, event.stream, event.pool_id)
            assert block is not None
        self.live.add(block.address if freed_here else event.address, block)

    def _allocate_there(self, event: TraceEvent) -> Block | None:
        return allocate_at(self.allocator, event.address, event.size, event.stream, event.pool_id)

    def _use_up_new(self) -> None:
        """Make the segments that the trace made and the simulator did not, as cache.

        So it is with pages mapped for a request that then ran out of memory.
        """
        for event in self._new:
            pool = self.allocator.pool(event.size <= _SMALL_SEGMENT_BYTES, event.pool_id)
            if event.kind == "segment_map":
                unmapped = pool.unmapped.get(event.stream, [])
                place = bisect_right(unmapped, event.address, key=lambda item: item[0]) - 1
                if place >= 0 and unmapped[place][0] == event.address:
                    block = unmapped[place][-1]
                    self.allocator.map_pages(block, min(event.size, block.size))
            elif event.size and event.address not in self.allocator.segments:
                block = self.allocator.add_segment(event.address, event.size, event.stream, pool)
                pool.add(block)
        self._new = []
        self._placement.expected = None

    def _release(self) -> None:
        """Give back what the trace gave back.

        Where a release is always of the whole cache, the simulator must find by itself what that
        is.
        """
        events, self._releases = self._releases, []
        if events and not self._partial:
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


def _likelier_start(new: TraceEvent, event: TraceEvent, known: frozenset[int]) -> int:
    """Return the address of a new segment, of which its first block is the front.

    Where the two events disagree, one is damaged: a segment's address is likely to be right if it
    turns up again.
    """
    if new.address != event.address and new.address not in known and event.address in known:
        return event.address
    return new.address


def _releases_partially(trace: Trace) -> bool:
    """Whether garbage collection, oversize blocks or private pools may release a part only."""
    return (
        trace.settings.max_split_size_bytes is not None
        or trace.settings.garbage_collection_threshold > 0
        or any(segment.pool_id != DEFAULT_POOL for segment in trace.segments)
        or any(event.pool_id != DEFAULT_POOL for event in trace.events)
    )
