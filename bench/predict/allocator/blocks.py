"""Blocks, the pools that hold the free ones, and the address ranges that grow."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Literal

__all__ = [
    "DEFAULT_POOL",
    "FREE",
    "LIVE",
    "UNMAPPED",
    "Block",
    "FreeItem",
    "Pool",
    "PoolId",
    "PoolName",
    "VirtualRange",
]

PoolName = Literal["small", "large"]
PoolId = tuple[int, int]
DEFAULT_POOL: PoolId = (0, 0)  # any other id is a CUDA graph's or a user's private memory pool

# A block's state. LIVE covers blocks that were freed but wait for another stream's event.
FREE, LIVE, UNMAPPED = 0, 1, 2


class Block:
    """A piece of a segment. ``prev`` and ``next`` are its neighbours in the same segment."""

    __slots__ = (
        "address",
        "freed_at_search",
        "next",
        "pending_events",
        "pool",
        "prev",
        "range",
        "requested",
        "size",
        "state",
        "stream",
        "used_on",
    )

    def __init__(
        self, address: int, size: int, stream: int, pool: Pool, range_: VirtualRange | None = None
    ) -> None:
        self.address = address
        self.size = size
        self.stream = stream
        self.pool = pool
        self.range = range_
        self.state = FREE
        self.requested = 0
        self.prev: Block | None = None
        self.next: Block | None = None
        self.freed_at_search = 0  # the pool's search count when the block became free
        self.used_on: set[int] | None = None  # other streams that recorded use
        self.pending_events = 0  # above 0 after a free that other streams delay

    @property
    def is_whole_segment(self) -> bool:
        """Whether the block is all of its segment, so that the driver could take it back."""
        return self.prev is None and self.next is None

    @property
    def is_releasable(self) -> bool:
        """Whether the block is free and all of a plain segment."""
        return self.state == FREE and self.range is None and self.is_whole_segment

    def insert_after(self, block: Block) -> None:
        """Put ``block`` between this one and its next neighbour."""
        follower = self.next
        block.prev, block.next = self, follower
        self.next = block
        if follower is not None:
            follower.prev = block

    def absorb_next(self) -> None:
        """Take over the next neighbour's bytes; its object is dead from here on."""
        follower = self.next
        assert follower is not None
        self.size += follower.size
        self.next = follower.next
        if self.next is not None:
            self.next.prev = self


class VirtualRange:
    """Address space of one expandable segment, of which whole pages are mapped as needed.

    ``head`` is the block at its start; the chain of blocks covers all of it, unmapped parts too.
    """

    __slots__ = ("address", "head", "page_bytes", "size")

    def __init__(self, address: int, size: int, page_bytes: int, stream: int, pool: Pool) -> None:
        self.address = address
        self.size = size
        self.page_bytes = page_bytes
        self.head = Block(address, size, stream, pool, self)
        self.head.state = UNMAPPED

    def whole_pages(self, block: Block) -> tuple[int, int]:
        """Return (start, size) of the pages that lie wholly inside ``block``; size 0: none."""
        page = self.page_bytes
        start = -(-(block.address - self.address) // page) * page
        end = (block.address + block.size - self.address) // page * page
        return self.address + start, max(end - start, 0)


FreeItem = tuple[int, int, int, Block]  # size, address, id, block: the order of the search


class Pool:
    """Free blocks of one size class, by stream: each list is ordered by (size, address)."""

    __slots__ = ("free", "id", "page_bytes", "searches", "small", "unmapped")

    def __init__(self, small: bool, page_bytes: int, pool_id: PoolId = DEFAULT_POOL) -> None:
        self.small = small
        self.page_bytes = page_bytes  # of expandable segments
        self.id = pool_id
        # The id stands before the block so that blocks are never compared; it decides nothing,
        # unless a trace is so damaged that two of its segments overlap.
        self.free: dict[int, list[FreeItem]] = {}
        self.unmapped: dict[int, list[tuple[int, int, Block]]] = {}  # ordered by address
        self.searches = 0  # counted only while garbage collection is on

    @property
    def name(self) -> PoolName:
        """What a PyTorch snapshot calls ``segment_type``."""
        return "small" if self.small else "large"

    def add(self, block: Block) -> None:
        """Put a free block into its place."""
        block.state = FREE
        block.freed_at_search = self.searches
        item = (block.size, block.address, id(block), block)
        blocks = self.free.get(block.stream)
        if blocks is None:
            self.free[block.stream] = [item]
        else:
            insort(blocks, item)

    def remove(self, block: Block) -> None:
        """Take a free block out; its size and address must not have changed since ``add``."""
        blocks = self.free[block.stream]
        del blocks[bisect_left(blocks, (block.size, block.address, id(block)))]

    def add_unmapped(self, block: Block) -> None:
        """Note address space that may be mapped."""
        block.state = UNMAPPED
        insort(self.unmapped.setdefault(block.stream, []), (block.address, id(block), block))

    def remove_unmapped(self, block: Block) -> None:
        """Forget address space that was mapped, merged or given back."""
        blocks = self.unmapped[block.stream]
        del blocks[bisect_left(blocks, (block.address, id(block)))]

    def all_free(self) -> list[Block]:
        """Return the free blocks of every stream by (stream, size, address)."""
        return [item[3] for stream in sorted(self.free) for item in self.free[stream]]
