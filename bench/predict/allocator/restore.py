"""Put an allocator into a recorded state: segments, and the blocks that live in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.predict.allocator.blocks import DEFAULT_POOL, FREE, LIVE, UNMAPPED, Block, Pool, PoolId
from bench.predict.allocator.caching import CachingAllocator
from bench.predict.allocator.rules import LARGEST_SMALL_BYTES, round_size

__all__ = ["allocate_at", "restore_range", "restore_segment"]

Piece = tuple[int, int]  # (address, size)


def restore_segment(
    allocator: CachingAllocator,
    piece: Piece,
    live: Sequence[Piece],
    *,
    stream: int = 0,
    small: bool = False,
    pool_id: PoolId = DEFAULT_POOL,
) -> list[Block]:
    """Add a plain segment that holds the ``live`` blocks, by address; the gaps are free.

    Returns the live blocks. Capacity is not asked. The blocks must lie inside, apart.
    """
    pool = allocator.pool(small, pool_id)
    head = allocator.add_segment(*piece, stream, pool)
    return _carve(allocator, pool, head, _pieces(piece, live))


def restore_range(
    allocator: CachingAllocator,
    piece: Piece,
    mapped: Sequence[tuple[Piece, Sequence[Piece]]],
    *,
    stream: int = 0,
    small: bool = False,
    pool_id: PoolId = DEFAULT_POOL,
) -> list[Block]:
    """Add the address space of an expandable segment with its mapped parts and their live blocks.

    Parts and blocks are given by address; parts are whole pages from the start of ``piece``.
    Returns the live blocks. Capacity is not asked.
    """
    pool = allocator.pool(small, pool_id)
    range_ = allocator.add_range(*piece, stream, pool)
    pool.remove_unmapped(range_.head)
    pieces: list[tuple[int, int, int]] = []
    cursor = piece[0]
    for part, live in mapped:
        if part[0] > cursor:
            pieces.append((cursor, part[0] - cursor, UNMAPPED))
        pieces += _pieces(part, live)
        cursor = part[0] + part[1]
        allocator.reserve(part[1])
    if cursor < piece[0] + piece[1]:
        pieces.append((cursor, piece[0] + piece[1] - cursor, UNMAPPED))
    return _carve(allocator, pool, range_.head, pieces)


def allocate_at(
    allocator: CachingAllocator,
    address: int,
    size: int,
    stream: int = 0,
    pool_id: PoolId = DEFAULT_POOL,
) -> Block | None:
    """Allocate at a given address, against best fit; None where that is not free."""
    rounded = round_size(size, allocator.settings)
    pool = allocator.pool(rounded <= LARGEST_SMALL_BYTES, pool_id)
    for block_size, start, _, block in pool.free.get(stream, ()):
        if start <= address and address + rounded <= start + block_size:
            pool.remove(block)
            if start < address:
                allocator.cut(block, address - start)
                pool.add(block)
                assert block.next is not None
                block = block.next
            return allocator.hand_out(block, rounded, size)
    return None


def _pieces(whole: Piece, live: Iterable[Piece]) -> list[tuple[int, int, int]]:
    """Cover ``whole`` with (address, size, state) pieces."""
    pieces = []
    cursor, end = whole[0], whole[0] + whole[1]
    for address, size in live:
        if address > cursor:
            pieces.append((cursor, address - cursor, FREE))
        pieces.append((address, size, LIVE))
        cursor = address + size
    if cursor < end:
        pieces.append((cursor, end - cursor, FREE))
    return pieces


def _carve(
    allocator: CachingAllocator, pool: Pool, head: Block, pieces: list[tuple[int, int, int]]
) -> list[Block]:
    """Cut ``head`` into the pieces that cover it."""
    live = []
    block = head
    for position, (_, size, state) in enumerate(pieces):
        if position < len(pieces) - 1:
            allocator.cut(block, size)
        block.state = state
        if state == FREE:
            pool.add(block)
        elif state == UNMAPPED:
            pool.add_unmapped(block)
        else:
            allocator.charge(block, block.size)
            live.append(block)
        if block.next is not None:
            block = block.next
    return live
