"""Each rule of the allocator, by numbers worked out by hand."""

from __future__ import annotations

import pytest

from bench.predict.alloc_conf import AllocatorSettings, parse_alloc_conf
from bench.predict.allocator import (
    Block,
    CachingAllocator,
    Counters,
    round_size,
    segment_size,
)
from bench.units import KIB, MIB

EXPANDABLE = AllocatorSettings(expandable_segments=True)


def take(allocator: CachingAllocator, size: int, stream: int = 0) -> Block:
    block = allocator.malloc(size, stream)
    assert block is not None
    return block


@pytest.mark.parametrize(
    ("requests", "settings", "sizes", "reserved"),
    [
        ([1], AllocatorSettings(), [512], 2 * MIB),
        ([MIB, MIB], AllocatorSettings(), [MIB, MIB], 2 * MIB),
        ([MIB + 512], AllocatorSettings(), [MIB + 512], 20 * MIB),
        ([10 * MIB + 512], AllocatorSettings(), [10 * MIB + 512], 12 * MIB),
        ([10 * MIB - 512] * 2, AllocatorSettings(), [10 * MIB - 512, 10 * MIB + 512], 20 * MIB),
        ([10 * MIB], AllocatorSettings(), [10 * MIB], 10 * MIB),
        ([23 * MIB // 2], AllocatorSettings(), [12 * MIB], 12 * MIB),
        ([23 * MIB // 2], EXPANDABLE, [23 * MIB // 2], 20 * MIB),
    ],
    ids=[
        *("1 B", "1 MiB twice", "1 MiB + 512", "10 MiB + 512", "10 MiB - 512 twice", "10 MiB"),
        *("11.5 MiB", "11.5 MiB expandable"),
    ],
)
def test_vectors(
    requests: list[int], settings: AllocatorSettings, sizes: list[int], reserved: int
) -> None:
    allocator = CachingAllocator(None, settings)
    blocks = [take(allocator, size) for size in requests]
    assert [block.size for block in blocks] == sizes
    assert allocator.counters == Counters(
        requested_bytes=sum(requests),
        allocated_bytes=sum(sizes),
        active_bytes=sum(sizes),
        reserved_bytes=reserved,
    )


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "rounded"),
        [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)],
    )
    def test_requests_are_rounded_up_to_512(self, size: int, rounded: int) -> None:
        assert round_size(size, AllocatorSettings()) == rounded

    @pytest.mark.parametrize(
        ("size", "rounded"),
        [
            (1200, 1536),  # not above 512 * 4: plain rounding
            (2048, 2048),
            (2049, 2560),  # steps of 512 between 2048 and 4096
            (5000, 5120),
            (3 * MIB + 1, 3 * MIB + 512 * KIB),
            (4 * MIB, 4 * MIB),
        ],
    )
    def test_with_divisions_they_are_rounded_up_to_a_quarter_of_a_power_of_two(
        self, size: int, rounded: int
    ) -> None:
        assert round_size(size, parse_alloc_conf("roundup_power2_divisions:4")) == rounded

    def test_divisions_are_looked_up_by_the_power_of_two_below(self) -> None:
        settings = parse_alloc_conf("roundup_power2_divisions:[2:8,4:1,8:2,>:4]")
        assert round_size(3 * MIB + 1, settings) == 3 * MIB + 256 * KIB  # eighths of 2 MiB
        assert round_size(5 * MIB + 1, settings) == 5 * MIB + 512  # 1 is off
        assert round_size(9 * MIB, settings) == 12 * MIB  # halves of 8 MiB
        assert round_size(100 << 30, settings) == 112 << 30  # above 64 GiB: the last entry

    def test_divisions_finer_than_the_request_are_not_used(self) -> None:
        """512 * d < size keeps every step above 512 bytes, so the allocator's own guard rests."""
        settings = parse_alloc_conf("roundup_power2_divisions:1024")
        assert round_size(512 * 1024, settings) == 512 * 1024
        assert round_size(600_000, settings) == 600_064  # steps of 512

    @pytest.mark.parametrize(
        ("rounded", "segment"),
        [
            (512, 2 * MIB),
            (MIB, 2 * MIB),
            (MIB + 512, 20 * MIB),
            (10 * MIB - 512, 20 * MIB),
            (10 * MIB, 10 * MIB),
            (10 * MIB + 512, 12 * MIB),
            (41 * MIB, 42 * MIB),
        ],
    )
    def test_segments(self, rounded: int, segment: int) -> None:
        assert segment_size(rounded, AllocatorSettings()) == segment

    def test_shared_large_segments_have_the_configured_size(self) -> None:
        settings = parse_alloc_conf("large_segment_size_mb:32")
        assert segment_size(2 * MIB, settings) == 32 * MIB
        assert segment_size(10 * MIB, settings) == 10 * MIB


class TestBestFit:
    def test_nothing_is_allocated_for_0_bytes(self) -> None:
        allocator = CachingAllocator()
        assert allocator.malloc(0) is None
        allocator.free(None)
        assert allocator.reserved_bytes == 0

    def test_a_negative_size_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="-1"):
            CachingAllocator().malloc(-1)

    def test_segments_lie_on_2_mib_boundaries_upwards(self) -> None:
        allocator = CachingAllocator(None, parse_alloc_conf("large_segment_size_mb:21"))
        addresses = [take(allocator, size).address for size in (5 * MIB, 30 * MIB, 1)]
        assert addresses == sorted(addresses)
        assert all(address % (2 * MIB) == 0 for address in addresses)

    def test_the_smallest_block_that_fits_is_taken(self) -> None:
        allocator = CachingAllocator()
        blocks = [take(allocator, size * MIB) for size in (30, 14, 20)]
        for block in blocks:
            allocator.free(block)
        assert take(allocator, 13 * MIB + 512).address == blocks[1].address

    def test_among_equals_the_lowest_address_is_taken(self) -> None:
        allocator = CachingAllocator()
        first, second = take(allocator, 14 * MIB), take(allocator, 14 * MIB)
        allocator.free(second)
        allocator.free(first)
        assert take(allocator, 14 * MIB).address == min(first.address, second.address)

    def test_another_streams_blocks_are_not_taken(self) -> None:
        allocator = CachingAllocator()
        allocator.free(take(allocator, 14 * MIB, stream=1))
        take(allocator, 14 * MIB, stream=0)
        assert allocator.reserved_bytes == 28 * MIB

    def test_small_and_large_requests_do_not_share_segments(self) -> None:
        allocator = CachingAllocator()
        take(allocator, 2 * MIB)  # leaves 18 MiB free
        take(allocator, MIB)
        assert allocator.reserved_bytes == 22 * MIB

    def test_private_pools_keep_to_themselves(self) -> None:
        allocator = CachingAllocator()
        allocator.free(take(allocator, 14 * MIB))
        private = allocator.malloc(14 * MIB, pool_id=(0, 1))
        allocator.free(private)
        assert allocator.reserved_bytes == 28 * MIB
        assert allocator.malloc(14 * MIB, pool_id=(0, 1)) is private
        allocator.free(private)
        allocator.empty_cache()
        assert allocator.reserved_bytes == 14 * MIB  # what is in use as a pool stays


class TestSplitting:
    def test_a_large_block_is_split_only_if_more_than_1_mib_is_left(self) -> None:
        allocator = CachingAllocator()
        allocator.free(take(allocator, 20 * MIB))
        kept_whole = take(allocator, 19 * MIB)  # exactly 1 MiB would be left
        assert kept_whole.size == 20 * MIB
        allocator.free(kept_whole)
        assert take(allocator, 19 * MIB - 512).size == 19 * MIB - 512

    def test_a_block_that_is_not_split_is_charged_whole(self) -> None:
        allocator = CachingAllocator()
        block = take(allocator, 23 * MIB // 2)
        assert allocator.allocated_bytes - allocator.requested_bytes == MIB // 2
        allocator.free(block)
        assert (allocator.allocated_bytes, allocator.requested_bytes) == (0, 0)

    def test_a_small_block_is_split_down_to_512(self) -> None:
        allocator = CachingAllocator()
        assert take(allocator, MIB - 512).size == MIB - 512
        assert take(allocator, MIB).size == MIB
        assert take(allocator, 512).size == 512
        assert allocator.reserved_bytes == 2 * MIB

    def test_free_neighbours_merge_within_a_segment_and_never_across(self) -> None:
        allocator = CachingAllocator()
        blocks = [take(allocator, 5 * MIB) for _ in range(8)]  # two segments of 20 MiB, full
        for place in (1, 3, 2, 4):
            allocator.free(blocks[place])
        free = sorted((b.address, b.size) for b in allocator.blocks() if b.state == 0)
        assert free == [(blocks[1].address, 15 * MIB), (blocks[4].address, 5 * MIB)]

    def test_freeing_twice_is_an_error(self) -> None:
        allocator = CachingAllocator()
        block = take(allocator, 100)
        allocator.free(block)
        with pytest.raises(ValueError, match="not allocated"):
            allocator.free(block)
        with pytest.raises(ValueError, match="not allocated"):
            allocator.defer_free(block)


class TestStreams:
    def test_a_block_used_by_another_stream_stays_active_until_that_stream_is_done(self) -> None:
        allocator = CachingAllocator()
        block = take(allocator, 14 * MIB)
        allocator.record_stream(block, 1)
        allocator.free(block)
        assert (allocator.allocated_bytes, allocator.active_bytes) == (0, 14 * MIB)
        take(allocator, 14 * MIB)
        assert allocator.reserved_bytes == 28 * MIB  # it could not be reused
        allocator.complete_events(1)
        assert allocator.active_bytes == 28 * MIB  # noticed at the next allocation only
        assert take(allocator, 14 * MIB) is block

    def test_all_recorded_streams_have_to_be_done(self) -> None:
        allocator = CachingAllocator()
        block = take(allocator, 14 * MIB)
        allocator.record_stream(block, 1)
        allocator.record_stream(block, 2)
        allocator.free(block)
        allocator.complete_events(1)
        take(allocator, 1)
        assert allocator.active_bytes == 14 * MIB + 512
        allocator.complete_events()
        take(allocator, 1)
        assert allocator.active_bytes == 1024

    def test_work_recorded_after_completion_is_waited_for_anew(self) -> None:
        allocator = CachingAllocator()
        first, second = take(allocator, 14 * MIB), take(allocator, 14 * MIB)
        for block in (first, second):
            allocator.record_stream(block, 1)
        allocator.free(first)
        allocator.complete_events(1)
        allocator.free(second)
        take(allocator, 1)
        assert allocator.active_bytes == 14 * MIB + 512

    def test_use_on_the_blocks_own_stream_delays_nothing(self) -> None:
        allocator = CachingAllocator()
        block = take(allocator, 14 * MIB, stream=3)
        allocator.record_stream(block, 3)
        allocator.free(block)
        assert allocator.active_bytes == 0

    def test_emptying_the_cache_waits_for_the_streams(self) -> None:
        allocator = CachingAllocator()
        block, deferred = take(allocator, 14 * MIB), take(allocator, 16 * MIB)
        allocator.record_stream(block, 1)
        allocator.free(block)
        allocator.defer_free(deferred)
        assert (allocator.allocated_bytes, allocator.active_bytes) == (0, 30 * MIB)
        allocator.empty_cache()
        assert (allocator.active_bytes, allocator.reserved_bytes) == (0, 0)
        allocator.complete_free(deferred)  # long done
        assert allocator.active_bytes == 0

    def test_a_block_waiting_for_a_stream_cannot_be_freed_again(self) -> None:
        allocator = CachingAllocator()
        block = take(allocator, 14 * MIB)
        allocator.record_stream(block, 1)
        allocator.free(block)
        with pytest.raises(ValueError, match="not allocated"):
            allocator.free(block)


def test_peaks_include_the_new_block_and_are_reset_to_the_present() -> None:
    allocator = CachingAllocator()
    block = take(allocator, 23 * MIB // 2)
    allocator.free(block)
    assert allocator.requested_peak_bytes == 23 * MIB // 2
    assert allocator.allocated_peak_bytes == allocator.active_peak_bytes == 12 * MIB
    assert allocator.reserved_peak_bytes == 12 * MIB
    allocator.reset_peaks()
    assert allocator.allocated_peak_bytes == allocator.requested_peak_bytes == 0
    assert allocator.active_peak_bytes == 0
    assert allocator.reserved_peak_bytes == 12 * MIB  # still cached
    allocator.empty_cache()
    allocator.reset_peaks()
    assert allocator.reserved_peak_bytes == 0


def test_segments_go_where_they_are_told_to() -> None:
    asked: list[tuple[int, str, int]] = []

    def place(size: int, pool: str, stream: int) -> int:
        asked.append((size, pool, stream))
        return len(asked) << 32

    allocator = CachingAllocator(None, place_segment=place)
    assert take(allocator, 1, stream=5).address == 1 << 32
    assert take(allocator, 3 * MIB).address == 2 << 32
    assert asked == [(2 * MIB, "small", 5), (20 * MIB, "large", 0)]
