"""Memory running out where a private pool asks, and where segments are no whole granules.

What is expected here PyTorch's own allocator did too: see ``test_allocator_recorded``.
"""

from __future__ import annotations

import pytest

from bench.predict.alloc_conf import parse_alloc_conf
from bench.predict.allocator import CachingAllocator, OutOfMemory, needs_bytes, simulate
from bench.units import MIB

_PRIVATE = (0, 1)


def test_a_private_pool_gets_none_of_the_cache_and_the_default_pool_does() -> None:
    allocator = CachingAllocator(40 * MIB)
    allocator.free(allocator.malloc(20 * MIB))
    with pytest.raises(OutOfMemory):
        allocator.malloc(30 * MIB, pool_id=_PRIVATE)
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (20 * MIB, 0)
    allocator.malloc(30 * MIB)
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (30 * MIB, 1)
    assert allocator.num_ooms == 1


def test_filling_a_private_pool_asks_no_other_stream_whether_it_is_done() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(20 * MIB)
    assert block is not None
    allocator.record_stream(block, 1)
    allocator.free(block)
    allocator.complete_events()
    allocator.malloc(1 * MIB, pool_id=_PRIVATE)
    assert allocator.active_bytes == 21 * MIB  # the 20 MiB still wait
    allocator.malloc(1 * MIB)
    assert allocator.active_bytes == 2 * MIB


def test_a_segment_of_13_mib_takes_14_of_the_drivers_memory() -> None:
    allocator = CachingAllocator(40 * MIB, parse_alloc_conf("large_segment_size_mb:13"))
    blocks = [allocator.malloc(9 * MIB) for _ in range(2)]
    with pytest.raises(OutOfMemory):  # 3 x 13 = 39 would fit, 3 x 14 = 42 do not
        allocator.malloc(9 * MIB)
    assert allocator.reserved_bytes == 26 * MIB
    for block in blocks:
        allocator.free(block)
    allocator.empty_cache()
    allocator.malloc(40 * MIB)  # all of it is back
    assert allocator.reserved_bytes == 40 * MIB


def test_the_memory_needed_counts_whole_granules() -> None:
    events = [("alloc", number, 9 * MIB, 0) for number in range(5)]
    settings = parse_alloc_conf("large_segment_size_mb:13")
    needed = needs_bytes(events, settings)
    assert needed == 5 * 14 * MIB
    assert simulate(events, needed, settings).oom_at_event is None
    assert simulate(events, needed - 2 * MIB, settings).oom_at_event == 4
