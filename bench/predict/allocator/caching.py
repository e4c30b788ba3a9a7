"""A simulator of PyTorch's CUDA caching allocator: same events in, same addresses out.

Source: torch 2.x, c10/cuda/CUDACachingAllocator.cpp; the rules are stated in our own words at
the methods that follow them. What is not simulated: free-memory callbacks, pools marked not to
split, and pools that step in when memory runs out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator.blocks import (
    DEFAULT_POOL,
    FREE,
    LIVE,
    UNMAPPED,
    Block,
    FreeItem,
    Pool,
    PoolId,
)
from bench.predict.allocator.rules import LARGEST_SMALL_BYTES, MIN_BLOCK_BYTES, round_size
from bench.predict.allocator.store import PlaceSegment, SegmentStore
from bench.units import format_bytes

__all__ = ["CachingAllocator", "Counters", "OutOfMemory"]

_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """The allocator's counters at one moment.

    requested <= allocated <= active <= reserved, except that bytes freed but waiting for another
    stream are still requested and active, and no longer allocated.
    """

    requested_bytes: int
    allocated_bytes: int
    active_bytes: int
    reserved_bytes: int


class OutOfMemory(Exception):
    """A request that did not fit, after everything cached was given back. A result, not a bug."""

    def __init__(self, request_bytes: int, capacity_bytes: int | None, counters: Counters) -> None:
        self.request_bytes = request_bytes
        self.capacity_bytes = capacity_bytes
        self.counters = counters
        limit = "" if capacity_bytes is None else f" of {format_bytes(capacity_bytes)}"
        super().__init__(
            f"out of memory: {format_bytes(request_bytes)} asked for, "
            f"{format_bytes(counters.reserved_bytes)}{limit} reserved"
        )


class CachingAllocator(SegmentStore):
    """One device's caching allocator, at a capacity.

    ``malloc`` returns the block, whose ``address`` is where the tensor lives; ``free`` takes it
    back. Counters are plain attributes (``allocated_bytes``, ``allocated_peak_bytes``, ...), in
    PyTorch's meaning: a block that is not split is charged whole, peaks include the new block.
    See ``SegmentStore`` for the arguments.

    Speed: some million events a second on one core.
    """

    def __init__(
        self,
        capacity_bytes: int | None = None,
        settings: AllocatorSettings | None = None,
        *,
        device_total_bytes: int | None = None,
        place_segment: PlaceSegment | None = None,
    ) -> None:
        settings = settings or AllocatorSettings()
        super().__init__(capacity_bytes, settings, device_total_bytes, place_segment)
        self.requested_bytes = self.requested_peak_bytes = 0
        self.allocated_bytes = self.allocated_peak_bytes = 0
        self.active_bytes = self.active_peak_bytes = 0
        self.num_alloc_retries = 0  # times that everything cached was given back for a request
        self.num_ooms = 0
        self._max_split = settings.max_split_size_bytes or _NO_LIMIT
        self._plain_rounding = not settings.roundup_power2_divisions
        self._collects = (
            self.allowed_bytes is not None and settings.garbage_collection_threshold > 0.0
        )
        self._plain_search = not self._collects and self._max_split == _NO_LIMIT
        self._waiting: dict[int, deque[Block]] = {}  # freed blocks by the stream they wait for
        self._completed: dict[int, int] = {}  # how many of them that stream is done with
        self._deferred: dict[Block, None] = {}  # freed blocks whose completion is reported

    @property
    def counters(self) -> Counters:
        """The counters as they stand."""
        return Counters(
            requested_bytes=self.requested_bytes,
            allocated_bytes=self.allocated_bytes,
            active_bytes=self.active_bytes,
            reserved_bytes=self.reserved_bytes,
        )

    def reset_peaks(self) -> None:
        """Set every peak to its counter's present value."""
        self.requested_peak_bytes = self.requested_bytes
        self.allocated_peak_bytes = self.allocated_bytes
        self.active_peak_bytes = self.active_bytes
        self.reserved_peak_bytes = self.reserved_bytes

    def malloc(
        self, size: int, stream: int = 0, pool_id: PoolId = DEFAULT_POOL, *, search: bool = True
    ) -> Block | None:
        """Allocate ``size`` bytes on ``stream``; 0 bytes allocate nothing and return None.

        The smallest cached block that is large enough is taken, at the lowest address among
        equals, else a new segment is made. ``search=False`` goes straight to the new segment,
        as a retry after an out-of-memory does. While it fills a private pool PyTorch asks no other
        stream whether it is done and gives no cache back: a CUDA graph may be recording.

        Errors: OutOfMemory, after which the allocator can be used on. ValueError if size < 0.
        """
        if size <= 0:
            if size < 0:
                raise ValueError(f"cannot allocate {size} bytes")
            return None
        if self._completed and pool_id == DEFAULT_POOL:
            self._process_events()
        rounded = (size + 511) & -512 if self._plain_rounding else round_size(size, self.settings)
        small = rounded <= LARGEST_SMALL_BYTES
        if pool_id == DEFAULT_POOL:
            pool = self._small if small else self._large
        else:
            pool = self.pool(small, pool_id)
        block = self._take_cached(pool, stream, rounded) if search else None
        if block is None:
            block = self._make_block(pool, stream, rounded, size)
        return self.hand_out(block, rounded, size)

    def hand_out(self, block: Block, rounded: int, requested: int) -> Block:
        """Allocate the front of ``block``, which is in no list; split off the rest if it may be."""
        rest = block.size - rounded
        if rest >= MIN_BLOCK_BYTES and (
            rounded <= LARGEST_SMALL_BYTES
            or self.expandable
            or (rest > LARGEST_SMALL_BYTES and rounded < self._max_split)
        ):
            self.cut(block, rounded)
            block.pool.add(block.next)  # type: ignore[arg-type]  # cut made it
        block.state = LIVE
        self.charge(block, requested)
        return block

    def charge(self, block: Block, requested: int) -> None:
        """Count a block as allocated for a request; not split, it is charged whole."""
        block.requested = requested
        charged = block.size
        self.requested_bytes += requested
        self.allocated_bytes += charged
        self.active_bytes += charged
        if self.requested_bytes > self.requested_peak_bytes:
            self.requested_peak_bytes = self.requested_bytes
        if self.allocated_bytes > self.allocated_peak_bytes:
            self.allocated_peak_bytes = self.allocated_bytes
        if self.active_bytes > self.active_peak_bytes:
            self.active_peak_bytes = self.active_bytes

    def free(self, block: Block | None) -> None:
        """Free a block that ``malloc`` returned; None is let through.

        A block that other streams recorded use of stays active until they are done with it.

        Errors: ValueError when the block is not allocated.
        """
        if block is None:
            return
        if block.state != LIVE or block.pending_events:
            raise ValueError(f"the block at {block.address:#x} is not allocated")
        self.allocated_bytes -= block.size
        if block.used_on:
            for stream in sorted(block.used_on):
                block.pending_events += 1
                self._waiting.setdefault(stream, deque()).append(block)
            block.used_on = None
        else:
            self._free_now(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Note that ``stream`` uses the block, so that its free waits for that stream."""
        if stream != block.stream:
            block.used_on = (block.used_on or set()) | {stream}

    def complete_events(self, stream: int | None = None) -> None:
        """Say that a stream (None: all) has done the work recorded so far.

        The blocks that waited for it become free at the next ``malloc``, as in PyTorch.
        """
        for waited_for in list(self._waiting) if stream is None else [stream]:
            if self._waiting.get(waited_for):
                self._completed[waited_for] = len(self._waiting[waited_for])

    def defer_free(self, block: Block) -> None:
        """Free a block whose completion ``complete_free`` will report."""
        if block.state != LIVE or block.pending_events:
            raise ValueError(f"the block at {block.address:#x} is not allocated")
        self.allocated_bytes -= block.size
        block.used_on = None
        block.pending_events = 1
        self._deferred[block] = None

    def complete_free(self, block: Block) -> None:
        """End a deferred free; nothing happens if an out-of-memory has ended it already."""
        if block in self._deferred:
            del self._deferred[block]
            block.pending_events = 0
            self._free_now(block)

    def empty_cache(self) -> None:
        """Give back all that is cached and can be: whole free segments, whole free pages.

        Waits for all streams first. Private pools keep theirs, as they do while in use.
        """
        self._synchronize()
        self.release_pool(self._large)
        self.release_pool(self._small)

    def _free_now(self, block: Block) -> None:
        self.active_bytes -= block.size
        self.requested_bytes -= block.requested
        before, after, pool = block.prev, block.next, block.pool
        if before is not None and before.state == FREE:
            pool.remove(before)
            before.absorb_next()
            block = before
        if after is not None and after.state == FREE:
            pool.remove(after)
            block.absorb_next()
        pool.add(block)

    def _process_events(self) -> None:
        for stream, count in self._completed.items():
            queue = self._waiting[stream]
            for _ in range(count):
                self._event_done(queue.popleft())
            if not queue:
                del self._waiting[stream]
        self._completed.clear()

    def _synchronize(self) -> None:
        self.complete_events()
        self._process_events()
        for block in list(self._deferred):
            self.complete_free(block)

    def _event_done(self, block: Block) -> None:
        block.pending_events -= 1
        if not block.pending_events:
            self._free_now(block)

    def _take_cached(self, pool: Pool, stream: int, rounded: int) -> Block | None:
        if self._collects:
            pool.searches += 1
        blocks = pool.free.get(stream)
        if not blocks:
            return None
        index = bisect_left(blocks, (rounded,))
        if index == len(blocks):
            return None
        block = blocks[index][3]
        if block.range is not None:
            index = self._best_of_expandable(blocks, index)
            if index == len(blocks):
                return None
            block = blocks[index][3]
        # The search is not continued when its hit is refused.
        if not self._plain_search and self._refuses(block, rounded):
            return None
        del blocks[index]
        return block

    def _refuses(self, block: Block, rounded: int) -> bool:
        """Oversize blocks serve oversize requests only, and only nearly their size."""
        if rounded < self._max_split:
            return block.size >= self._max_split
        return block.size >= rounded + self.settings.max_non_split_rounding_bytes

    def _best_of_expandable(self, blocks: list[FreeItem], index: int) -> int:
        """Move on from a block that could grow to one that could grow less.

        With expandable segments off, their blocks are passed over instead.
        """
        last = len(blocks) - 1
        if not self.expandable:
            while index <= last and blocks[index][3].range is not None:
                index += 1
            return index
        while (
            blocks[index][3].range is not None
            and index < last
            and _growable_size(blocks[index + 1][3]) < _growable_size(blocks[index][3])
        ):
            index += 1
        return index

    def _make_block(self, pool: Pool, stream: int, rounded: int, size: int) -> Block:
        """Get a new segment, releasing ever more of the cache until there is room."""
        if self._collects:
            self._collect_garbage()
        block = self._new_segment(pool, stream, rounded)
        if block is None and self._release_oversize(pool, stream, rounded):
            block = self._new_segment(pool, stream, rounded)
        if block is None and pool.id == DEFAULT_POOL:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = self._new_segment(pool, stream, rounded)
        if block is None:
            self.num_ooms += 1
            raise OutOfMemory(size, self.capacity_bytes, self.counters)
        return block

    def _release_oversize(self, pool: Pool, stream: int, rounded: int) -> bool:
        """Give back just enough blocks above ``max_split_size``; whether it was enough."""
        if self._max_split == _NO_LIMIT:
            return False
        wanted = max(rounded, self._max_split)
        blocks = pool.free.get(stream, [])
        index = bisect_left(blocks, (wanted,))
        if index < len(blocks) and blocks[index][3].range is None:
            self.release_segment(blocks[index][3])
            return True
        released = 0
        for candidate_size, _, _, block in reversed(blocks[:index]):
            if released >= wanted or candidate_size < self._max_split:
                break
            if block.range is None:
                released += candidate_size
                self.release_segment(block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Give back whole large segments that no search has used for longer than average."""
        assert self.allowed_bytes is not None
        threshold = int(self.settings.garbage_collection_threshold * self.allowed_bytes)
        target = self.reserved_bytes - threshold
        if target <= 0:
            return
        searches = self._large.searches
        unsplit = [block for block in self._large.all_free() if block.is_whole_segment]
        total_age = sum(searches - block.freed_at_search for block in unsplit)
        count, reclaimed, progress = len(unsplit), 0, True
        while reclaimed < target and progress and count:
            old_enough = total_age / count
            progress = False
            for block in list(unsplit):
                age = searches - block.freed_at_search
                if block.range is None and age >= old_enough:
                    progress = True
                    reclaimed += block.size
                    total_age -= age
                    count -= 1
                    unsplit.remove(block)
                    self.release_segment(block)


def _growable_size(block: Block) -> int:
    follower = block.next
    if follower is not None and follower.state == UNMAPPED:
        return block.size + follower.size
    return block.size
