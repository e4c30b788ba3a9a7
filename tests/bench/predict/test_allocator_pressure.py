"""What happens when memory runs short, by numbers worked out by hand."""

from __future__ import annotations

import pytest

from bench.predict.alloc_conf import AllocatorSettings, parse_alloc_conf
from bench.predict.allocator import Block, CachingAllocator, OutOfMemory
from bench.units import MIB

EXPANDABLE = AllocatorSettings(expandable_segments=True)


def take(allocator: CachingAllocator, size: int, stream: int = 0) -> Block:
    block = allocator.malloc(size, stream)
    assert block is not None
    return block


class TestOversize:
    """``max_split_size_mb:40``."""

    settings = parse_alloc_conf("max_split_size_mb:40")

    def test_an_oversize_block_does_not_serve_a_smaller_request(self) -> None:
        allocator = CachingAllocator(None, self.settings)
        allocator.free(take(allocator, 40 * MIB))
        take(allocator, 39 * MIB)
        assert allocator.reserved_bytes == 80 * MIB  # 39 MiB gets 40 of its own

    def test_an_oversize_block_serves_a_request_nearly_its_size_unsplit(self) -> None:
        allocator = CachingAllocator(None, self.settings)
        allocator.free(take(allocator, 60 * MIB))
        block = take(allocator, 40 * MIB + 512)
        assert (block.size, allocator.reserved_bytes) == (60 * MIB, 60 * MIB)
        allocator.free(block)
        take(allocator, 40 * MIB)  # exactly 20 MiB below: too wasteful
        assert allocator.reserved_bytes == 100 * MIB

    def test_how_near_can_be_configured(self) -> None:
        settings = parse_alloc_conf("max_split_size_mb:40,max_non_split_rounding_mb:30")
        allocator = CachingAllocator(None, settings)
        allocator.free(take(allocator, 60 * MIB))
        assert take(allocator, 40 * MIB).size == 60 * MIB

    def test_under_pressure_the_smallest_sufficient_oversize_block_goes(self) -> None:
        allocator = CachingAllocator(200 * MIB, self.settings)
        for block in [take(allocator, size * MIB) for size in (80, 50, 44)]:
            allocator.free(block)
        take(allocator, 39 * MIB)  # needs 40, 26 are left: the 44 are given back, nothing else
        assert allocator.reserved_bytes == 80 * MIB + 50 * MIB + 40 * MIB
        assert allocator.num_alloc_retries == 0

    def test_or_the_largest_ones_until_they_suffice(self) -> None:
        allocator = CachingAllocator(200 * MIB, self.settings)
        for block in [take(allocator, size * MIB) for size in (44, 50, 60)]:
            allocator.free(block)
        take(allocator, 100 * MIB)  # 60 + 50 >= 100: the 44 stay
        assert allocator.reserved_bytes == 44 * MIB + 100 * MIB
        assert allocator.num_alloc_retries == 0

    def test_no_more_of_them_than_suffice_exactly(self) -> None:
        allocator = CachingAllocator(200 * MIB, self.settings)
        for block in [take(allocator, size * MIB) for size in (50, 60, 50)]:
            allocator.free(block)
        take(allocator, 110 * MIB)  # 60 + 50
        assert allocator.reserved_bytes == 50 * MIB + 110 * MIB

    def test_or_else_everything(self) -> None:
        allocator = CachingAllocator(100 * MIB, self.settings)
        for block in [take(allocator, size * MIB) for size in (44, 30)]:
            allocator.free(block)
        take(allocator, 90 * MIB)
        assert allocator.reserved_bytes == 90 * MIB
        assert allocator.num_alloc_retries == 1


class TestPressure:
    def test_a_request_that_does_not_fit_releases_the_cache_and_tries_again(self) -> None:
        allocator = CachingAllocator(40 * MIB)
        allocator.free(take(allocator, 30 * MIB))
        take(allocator, 32 * MIB)
        assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (32 * MIB, 1)

    def test_a_split_segment_with_one_live_piece_is_kept(self) -> None:
        allocator = CachingAllocator()
        blocks = [take(allocator, 5 * MIB) for _ in range(4)]
        for block in blocks[1:]:
            allocator.free(block)
        allocator.empty_cache()
        assert allocator.reserved_bytes == 20 * MIB
        allocator.free(blocks[0])
        allocator.empty_cache()
        assert allocator.reserved_bytes == 0
        assert not list(allocator.blocks())

    def test_out_of_memory_carries_the_request_and_the_counters(self) -> None:
        allocator = CachingAllocator(40 * MIB)
        take(allocator, 30 * MIB)
        take(allocator, 100)
        with pytest.raises(OutOfMemory, match=r"10 MiB asked for, 32 MiB of 40 MiB") as caught:
            allocator.malloc(10 * MIB - 1024)
        assert caught.value.request_bytes == 10 * MIB - 1024
        assert caught.value.capacity_bytes == 40 * MIB
        assert caught.value.counters == allocator.counters
        assert (allocator.num_ooms, allocator.num_alloc_retries) == (1, 1)

    def test_the_allocator_can_be_used_on_after_out_of_memory(self) -> None:
        allocator = CachingAllocator(40 * MIB)
        take(allocator, 30 * MIB)
        with pytest.raises(OutOfMemory):
            allocator.malloc(30 * MIB)
        assert take(allocator, 10 * MIB).size == 10 * MIB

    @pytest.mark.parametrize("capacity", [20 * MIB, 20 * MIB - 1])
    def test_a_segment_must_fit_whole(self, capacity: int) -> None:
        allocator = CachingAllocator(capacity)
        if capacity == 20 * MIB:
            take(allocator, 2 * MIB)
        else:
            with pytest.raises(OutOfMemory):
                allocator.malloc(2 * MIB)

    def test_the_share_of_the_process_is_a_capacity_of_its_own(self) -> None:
        settings = parse_alloc_conf("per_process_memory_fraction:0.5")
        allocator = CachingAllocator(90 * MIB, settings, device_total_bytes=100 * MIB)
        take(allocator, 50 * MIB)
        with pytest.raises(OutOfMemory):
            allocator.malloc(1)

    def test_the_share_is_held_against_the_segment_even_if_pages_would_do(self) -> None:
        """An expandable 15 MiB maps one page of 20; the check asks for 16, a plain segment's."""
        settings = parse_alloc_conf("per_process_memory_fraction:0.5,expandable_segments:True")
        allocator = CachingAllocator(None, settings, device_total_bytes=32 * MIB)
        take(allocator, 15 * MIB)
        assert allocator.reserved_bytes == 20 * MIB > allocator.allowed_bytes  # type: ignore[operator]


class TestGarbageCollection:
    """Share 0.5 of 200 MiB, threshold 0.6: collected when more than 60 MiB are reserved."""

    settings = parse_alloc_conf("garbage_collection_threshold:0.6,per_process_memory_fraction:0.5")

    def allocator(self) -> CachingAllocator:
        return CachingAllocator(None, self.settings, device_total_bytes=200 * MIB)

    def test_nothing_is_collected_up_to_the_threshold(self) -> None:
        allocator = self.allocator()
        for block in [take(allocator, 30 * MIB), take(allocator, 30 * MIB)]:
            allocator.free(block)
        take(allocator, 32 * MIB)
        assert allocator.reserved_bytes == 92 * MIB

    def test_the_oldest_whole_segments_go_first(self) -> None:
        allocator = self.allocator()
        old, young = take(allocator, 20 * MIB), take(allocator, 34 * MIB)
        allocator.free(old)  # after search 2
        allocator.free(take(allocator, 5 * MIB, stream=1))  # search 3, 54 reserved: no collection
        allocator.free(young)
        # Search 4: 74 reserved, 14 too many. Ages: old 2, that of 5 MiB 1, young 1; mean 4/3.
        take(allocator, 36 * MIB)
        assert allocator.reserved_bytes == 34 * MIB + 20 * MIB + 36 * MIB

    def test_collection_repeats_until_it_has_reclaimed_enough(self) -> None:
        allocator = self.allocator()
        old, young = take(allocator, 12 * MIB), take(allocator, 60 * MIB)
        allocator.free(old)
        allocator.free(take(allocator, 100))  # a search in the small pool ages nothing
        take(allocator, 14 * MIB)  # search 3: 74 + 14 reserved after; old (age 1) goes first
        assert allocator.reserved_bytes == 60 * MIB + 2 * MIB + 14 * MIB
        allocator.free(young)
        take(allocator, 62 * MIB)  # 76 > 60: 16 to reclaim, the only whole segment goes
        assert allocator.reserved_bytes == 2 * MIB + 14 * MIB + 62 * MIB

    def test_split_segments_are_not_collected(self) -> None:
        allocator = self.allocator()
        pieces = [take(allocator, 5 * MIB) for _ in range(16)]  # four full segments
        for piece in pieces[1:4]:
            allocator.free(piece)
        take(allocator, 18 * MIB)
        assert allocator.reserved_bytes == 98 * MIB

    def test_without_a_share_there_is_no_collection(self) -> None:
        settings = parse_alloc_conf("garbage_collection_threshold:0.1")
        allocator = CachingAllocator(200 * MIB, settings)
        allocator.free(take(allocator, 100 * MIB))
        take(allocator, 20 * MIB, stream=1)
        assert allocator.reserved_bytes == 120 * MIB


class TestExpandable:
    def test_pages_are_mapped_as_they_are_missing(self) -> None:
        allocator = CachingAllocator(None, EXPANDABLE)
        first = take(allocator, 15 * MIB)
        assert allocator.reserved_bytes == 20 * MIB
        second = take(allocator, 30 * MIB)  # 5 are there, 25 are missing: two pages
        assert second.address == first.address + 15 * MIB
        assert allocator.reserved_bytes == 60 * MIB
        assert len(allocator.ranges) == 1

    def test_small_pages_are_2_mib_and_live_in_a_range_of_their_own(self) -> None:
        allocator = CachingAllocator(None, EXPANDABLE)
        take(allocator, MIB)
        take(allocator, MIB + 512)
        assert allocator.reserved_bytes == 22 * MIB
        assert len(allocator.ranges) == 2

    def test_pages_have_the_configured_size(self) -> None:
        settings = parse_alloc_conf("expandable_segments:True,large_segment_size_mb:12")
        allocator = CachingAllocator(None, settings)
        take(allocator, 13 * MIB)
        assert allocator.reserved_bytes == 24 * MIB

    def test_streams_have_ranges_of_their_own(self) -> None:
        allocator = CachingAllocator(None, EXPANDABLE)
        take(allocator, 2 * MIB, stream=0)
        take(allocator, 2 * MIB, stream=1)
        assert allocator.reserved_bytes == 40 * MIB

    def test_the_block_at_the_growing_end_is_used_last(self) -> None:
        """A hole of 12 MiB is preferred to the tighter 8 MiB at the end, which can grow."""
        allocator = CachingAllocator(None, EXPANDABLE)
        blocks = [take(allocator, size * MIB) for size in (20, 12, 20)]  # 52 of 60 mapped
        allocator.free(blocks[1])
        assert take(allocator, 7 * MIB).address == blocks[1].address

    def test_whole_free_pages_are_unmapped_and_the_rest_stays(self) -> None:
        allocator = CachingAllocator(None, EXPANDABLE)
        blocks = [take(allocator, 15 * MIB) for _ in range(4)]  # three pages of 20 MiB, full
        allocator.free(blocks[1])
        allocator.free(blocks[2])
        allocator.empty_cache()  # 15 to 45 are free: the page from 20 to 40 goes
        assert allocator.reserved_bytes == 40 * MIB
        start = blocks[0].address
        free = sorted((b.address - start, b.size) for b in allocator.blocks() if b.state == 0)
        assert free == [(15 * MIB, 5 * MIB), (40 * MIB, 5 * MIB)]

    def test_an_unmapped_hole_is_filled_before_the_end_grows(self) -> None:
        allocator = CachingAllocator(None, EXPANDABLE)
        blocks = [take(allocator, 15 * MIB) for _ in range(4)]
        allocator.free(blocks[1])
        allocator.free(blocks[2])
        allocator.empty_cache()
        refilled = take(allocator, 30 * MIB)
        assert refilled.address == blocks[1].address
        assert allocator.reserved_bytes == 60 * MIB

    def test_a_range_with_nothing_mapped_goes(self) -> None:
        allocator = CachingAllocator(None, EXPANDABLE)
        allocator.free(take(allocator, 50 * MIB))
        allocator.empty_cache()
        assert (allocator.reserved_bytes, allocator.ranges) == (0, [])
        take(allocator, 1)
        assert allocator.reserved_bytes == 2 * MIB

    def test_fragments_that_plain_segments_could_not_give_back_are_used(self) -> None:
        """After freeing every other page, 40 MiB fit on 60 MiB only because pages move."""
        allocator = CachingAllocator(60 * MIB, EXPANDABLE)
        blocks = [take(allocator, 20 * MIB) for _ in range(3)]
        allocator.free(blocks[0])
        allocator.free(blocks[2])
        assert take(allocator, 40 * MIB).size == 40 * MIB
        assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (60 * MIB, 1)

    def test_pages_mapped_before_memory_ran_out_stay_as_cache(self) -> None:
        """Hole of one page, then the end: the hole is filled, the second page is not to be had."""
        allocator = CachingAllocator(60 * MIB, EXPANDABLE)
        blocks = [take(allocator, 20 * MIB) for _ in range(3)]
        allocator.free(blocks[1])
        with pytest.raises(OutOfMemory):
            allocator.malloc(61 * MIB)
        assert allocator.reserved_bytes == 40 * MIB
        take(allocator, 20 * MIB)
        assert allocator.reserved_bytes == 60 * MIB

    def test_address_space_is_nine_eighths_of_the_card_then_another_range_begins(self) -> None:
        """80 MiB give 90 -> 100 of address space; 40 live at its end leave runs of 60 at most."""
        allocator = CachingAllocator(80 * MIB, EXPANDABLE)
        blocks = [take(allocator, 20 * MIB) for _ in range(4)]
        allocator.free(blocks[0])
        allocator.free(blocks[2])
        big = take(allocator, 40 * MIB)  # the run of 20 + the 20 beyond the end is not joined
        assert len(allocator.ranges) == 2
        assert big.address == allocator.ranges[1].address

    def test_more_than_the_address_space_is_out_of_memory(self) -> None:
        allocator = CachingAllocator(None, EXPANDABLE, device_total_bytes=80 * MIB)
        with pytest.raises(OutOfMemory):
            allocator.malloc(101 * MIB)

    def test_while_switched_off_expandable_blocks_are_passed_over(self) -> None:
        allocator = CachingAllocator(None, EXPANDABLE)
        allocator.free(take(allocator, 14 * MIB))
        allocator.expandable = False
        plain = take(allocator, 13 * MIB)
        assert allocator.reserved_bytes == 20 * MIB + 14 * MIB
        allocator.free(plain)
        assert take(allocator, 13 * MIB).address == plain.address
        with_search_over = take(allocator, 13 * MIB)
        assert with_search_over.range is None
