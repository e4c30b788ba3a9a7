"""Where blocks come from: segments of a pretended driver, and pages mapped into address space.

Source: torch 2.x, c10/cuda/CUDACachingAllocator.cpp. This half of the allocator knows segments,
pages, splitting and merging; ``caching`` decides when to use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator.blocks import (
    DEFAULT_POOL,
    FREE,
    LIVE,
    UNMAPPED,
    Block,
    Pool,
    PoolId,
    PoolName,
    VirtualRange,
)
from bench.predict.allocator.rules import SEGMENT_ROUNDING_BYTES, SMALL_SEGMENT_BYTES, segment_size

__all__ = ["PlaceSegment", "SegmentStore"]

PlaceSegment = Callable[[int, PoolName, int], int]  # (size, pool, stream) -> address

_FIRST_ADDRESS = 0x7F00_0000_0000  # about where CUDA's driver puts device memory on Linux
_UNBOUNDED_RANGE_BYTES = 1 << 44  # address space of an expandable segment on no card in particular


class SegmentStore:
    """Segments and the blocks in them; ``reserved_bytes`` is what the driver has handed out.

    ``capacity_bytes``: what the driver can hand out, None without limit. ``device_total_bytes``:
    the card's whole memory, from which the address space of expandable segments and the share of
    ``per_process_memory_fraction`` follow; the capacity unless given. ``place_segment`` chooses
    the address of each new segment or expandable range.
    """

    def __init__(
        self,
        capacity_bytes: int | None,
        settings: AllocatorSettings,
        device_total_bytes: int | None,
        place_segment: PlaceSegment | None,
    ) -> None:
        self.settings = settings
        self.capacity_bytes = capacity_bytes
        self.expandable = settings.expandable_segments
        self.reserved_bytes = 0
        self.reserved_peak_bytes = 0
        self._granule_bytes = 0  # that the driver's granules take beyond what was asked for
        self.segments: dict[int, Block] = {}  # by address: the first block of each plain segment
        self.ranges: list[VirtualRange] = []
        total = capacity_bytes if device_total_bytes is None else device_total_bytes
        self._range_bytes = _UNBOUNDED_RANGE_BYTES if total is None else total + total // 8
        self.allowed_bytes: int | None = None  # the process's share, where it has one
        if total is not None and settings.per_process_memory_fraction < 1.0:
            self.allowed_bytes = int(settings.per_process_memory_fraction * total)
        self._next_address = _FIRST_ADDRESS
        self._place_segment = place_segment or self._make_up_address
        self._small = Pool(True, SMALL_SEGMENT_BYTES)
        self._large = Pool(False, settings.large_segment_size_bytes)
        self._pools = {DEFAULT_POOL: (self._small, self._large)}

    def pool(self, small: bool, pool_id: PoolId = DEFAULT_POOL) -> Pool:
        """Return the pool of that size class, made on first use if it is a private one."""
        pools = self._pools.get(pool_id)
        if pools is None:
            large_page = self.settings.large_segment_size_bytes
            pools = (Pool(True, SMALL_SEGMENT_BYTES, pool_id), Pool(False, large_page, pool_id))
            self._pools[pool_id] = pools
        return pools[0] if small else pools[1]

    def heads(self) -> Iterator[Block]:
        """Yield the first block of every plain segment and of every expandable range."""
        yield from self.segments.values()
        for range_ in self.ranges:
            yield range_.head

    def blocks(self) -> Iterator[Block]:
        """Yield every block, unmapped address space included, segment by segment."""
        for head in self.heads():
            block: Block | None = head
            while block is not None:
                yield block
                block = block.next

    def add_segment(self, address: int, size: int, stream: int, pool: Pool) -> Block:
        """Note a segment that the driver has handed out; the block is not yet in the pool."""
        block = Block(address, size, stream, pool)
        self.segments[address] = block
        self._granule_bytes += -size % SEGMENT_ROUNDING_BYTES
        self.reserve(size)
        return block

    def add_range(self, address: int, size: int, stream: int, pool: Pool) -> VirtualRange:
        """Reserve address space for an expandable segment; nothing of it is mapped."""
        range_ = VirtualRange(address, size, pool.page_bytes, stream, pool)
        self.ranges.append(range_)
        pool.add_unmapped(range_.head)
        return range_

    def _make_up_address(self, size: int, _pool: PoolName, _stream: int) -> int:
        address = self._next_address
        self._next_address += -(-size // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES
        return address

    def reserve(self, size: int) -> None:
        """Count ``size`` more bytes as handed out by the driver."""
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)

    def _has_room(self, size: int) -> bool:
        if self.capacity_bytes is None:
            return True
        return self.reserved_bytes + self._granule_bytes + size <= self.capacity_bytes

    def _new_segment(self, pool: Pool, stream: int, rounded: int) -> Block | None:
        """Get memory for ``rounded`` bytes from the driver, as PyTorch's alloc_block does."""
        size = segment_size(rounded, self.settings)
        # The share is checked against a plain segment's size even when pages will be mapped.
        if self.allowed_bytes is not None and self.reserved_bytes + size > self.allowed_bytes:
            return None
        if self.expandable:
            return self._expand(pool, stream, rounded)
        if not self._has_room(size + -size % SEGMENT_ROUNDING_BYTES):
            return None
        return self.add_segment(self._place_segment(size, pool.name, stream), size, stream, pool)

    def _expand(self, pool: Pool, stream: int, rounded: int) -> Block | None:
        """Map what is missing at the lowest address where ``rounded`` bytes can be had.

        Pages mapped before the driver ran out stay mapped, as a free block.
        """
        candidate = self.lowest_run(pool, stream, rounded)
        if candidate is None:
            space = -(-self._range_bytes // pool.page_bytes) * pool.page_bytes
            candidate = self.add_range(
                self._place_segment(space, pool.name, stream), space, stream, pool
            ).head
        if candidate.state == UNMAPPED:
            mapped = self.map_pages(candidate, min(candidate.size, rounded))
            if mapped is None:
                return None
            candidate = mapped
        while candidate.size < rounded:
            follower = candidate.next
            if follower is None or follower.state != UNMAPPED:  # address space exhausted
                return None
            missing = rounded - candidate.size
            mapped = self.map_pages(follower, min(missing, follower.size))
            if mapped is None:
                return None
            candidate = mapped
        pool.remove(candidate)
        return candidate

    def lowest_run(self, pool: Pool, stream: int, rounded: int) -> Block | None:
        """Return where the lowest free and unmapped stretch of ``rounded`` bytes starts."""
        for _, _, unmapped in pool.unmapped.get(stream, ()):
            first = unmapped
            if first.prev is not None and first.prev.state == FREE:
                first = first.prev
            space, block = 0, first
            while space < rounded and block.state != LIVE:
                space += block.size
                if block.next is None:
                    break
                block = block.next
            if space >= rounded:
                return first
        return None

    def map_pages(self, block: Block, size: int) -> Block | None:
        """Map the first ``size`` bytes of unmapped ``block``, rounded up to whole pages.

        Returns the free block that the pages are now part of, None where memory ran out.
        """
        range_, pool = block.range, block.pool
        assert range_ is not None
        mapped = min(-(-size // range_.page_bytes) * range_.page_bytes, block.size)
        if not self._has_room(mapped):
            return None
        pool.remove_unmapped(block)
        if mapped < block.size:
            self.cut(block, mapped)
            assert block.next is not None
            pool.add_unmapped(block.next)
        block.state = FREE
        block = self._merge(block)
        pool.add(block)
        self.reserve(mapped)
        return block

    def unmap_pages(self, block: Block) -> None:
        """Give back the whole pages inside a free block; what is left of it stays free."""
        range_, pool = block.range, block.pool
        assert range_ is not None
        start, size = range_.whole_pages(block)
        if not size:
            return
        pool.remove(block)
        if start > block.address:
            self.cut(block, start - block.address)
            pool.add(block)
            assert block.next is not None
            block = block.next
        if block.size > size:
            self.cut(block, size)
            assert block.next is not None
            pool.add(block.next)
        block.state = UNMAPPED
        pool.add_unmapped(self._merge(block))
        self.reserved_bytes -= size
        if range_.head.size == range_.size:  # nothing mapped: the address space goes too
            pool.remove_unmapped(range_.head)
            self.ranges.remove(range_)

    def release_segment(self, block: Block) -> None:
        """Give a free block that is a whole segment back to the driver."""
        block.pool.remove(block)
        self.reserved_bytes -= block.size
        self._granule_bytes -= -block.size % SEGMENT_ROUNDING_BYTES
        del self.segments[block.address]

    def release_pool(self, pool: Pool) -> None:
        """Give back every free whole segment and every whole free page of a pool."""
        for block in pool.all_free():
            if block.range is not None:
                self.unmap_pages(block)
            elif block.is_whole_segment:
                self.release_segment(block)

    def cut(self, block: Block, size: int) -> None:
        """Leave ``size`` bytes to ``block``; the rest becomes its next neighbour."""
        rest = Block(block.address + size, block.size - size, block.stream, block.pool, block.range)
        block.size = size
        block.insert_after(rest)

    def _merge(self, block: Block) -> Block:
        """Join ``block``, which is in no list, with its neighbours of the same state.

        The block at the lower address lives on, so that a segment's first block stays the same
        object.
        """
        state, pool = block.state, block.pool
        remove = pool.remove if state == FREE else pool.remove_unmapped
        before, after = block.prev, block.next
        if before is not None and before.state == state:
            remove(before)
            before.absorb_next()
            block = before
        if after is not None and after.state == state:
            remove(after)
            block.absorb_next()
        return block

    def find_free(self, address: int, size: int) -> Block | None:
        """Return the free block of an expandable segment that covers that range."""
        for range_ in self.ranges:
            if range_.address <= address < range_.address + range_.size:
                for pool_blocks in range_.head.pool.free.values():
                    for block_size, start, _, block in pool_blocks:
                        inside = start <= address and address + size <= start + block_size
                        if inside and block.range is range_:
                            return block
        return None
