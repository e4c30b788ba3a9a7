"""The state at a trace's start, from small traces whose start is known."""

from __future__ import annotations

from bench.predict.alloc_conf import AllocatorSettings, parse_alloc_conf
from bench.predict.start_state import settle_blocks, state_at_start
from bench.predict.trace import EventKind, RecordedSegment, TraceEvent
from bench.units import MIB

BASE = 1 << 40
DEFAULT = AllocatorSettings()
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def event(kind: EventKind, offset: int, size: int = 0, place: int = 0) -> TraceEvent:
    return TraceEvent(kind, BASE + offset, size, 0, (0, 0), place)


def large(*blocks: tuple[int, int], size: int = 40 * MIB) -> RecordedSegment:
    placed = tuple((BASE + offset, length) for offset, length in blocks)
    return RecordedSegment(address=BASE, size=size, stream=0, small=False, blocks=placed)


def blocks_of(segments: tuple[RecordedSegment, ...]) -> list[tuple[int, int]]:
    return [(address - BASE, size) for segment in segments for address, size in segment.blocks]


def test_running_backwards_undoes_allocations_and_frees() -> None:
    final = (large((0, 4 * MIB), (10 * MIB, 6 * MIB)),)
    events = [
        event("free", 20 * MIB, 5 * MIB - 100),
        event("alloc", 10 * MIB, 6 * MIB),
        event("free_requested", 0),
    ]
    start = state_at_start(final, events, DEFAULT)
    assert blocks_of(start) == [(0, 4 * MIB), (20 * MIB, 5 * MIB)]


def test_new_segments_go_and_freed_ones_come_back() -> None:
    final = (large((0, 40 * MIB)),)
    events = [
        event("segment_free", 1 << 30, 22 * MIB),
        event("segment_free", 2 << 30, 2 * MIB),
        event("segment_alloc", 0, 40 * MIB),
        event("alloc", 0, 40 * MIB),
    ]
    start = state_at_start(final, events, DEFAULT)
    assert [(s.address - BASE, s.size, s.small, s.blocks) for s in start] == [
        (1 << 30, 22 * MIB, False, ()),
        (2 << 30, 2 * MIB, True, ()),
    ]


def test_a_gap_of_up_to_1_mib_in_the_large_pool_belongs_to_the_block_before_it() -> None:
    segment = large((0, 10 * MIB), (11 * MIB, 9 * MIB), (22 * MIB - 512, 4 * MIB))
    settled = settle_blocks([segment], [], DEFAULT)
    assert blocks_of(settled) == [
        (0, 11 * MIB),  # exactly 1 MiB
        (11 * MIB, 9 * MIB),  # 2 MiB - 512: free
        (22 * MIB - 512, 4 * MIB),
    ]


def test_of_a_longer_gap_what_lies_before_its_first_new_block_does() -> None:
    segment = large((0, 10 * MIB), (30 * MIB, 10 * MIB))
    first_there = event("alloc", 10 * MIB + 1024, 2 * MIB)
    assert blocks_of(settle_blocks([segment], [first_there], DEFAULT))[0] == (0, 10 * MIB + 1024)
    later = [event("alloc", 10 * MIB, 2 * MIB), first_there]
    assert blocks_of(settle_blocks([segment], later, DEFAULT))[0] == (0, 10 * MIB)


def test_once_the_block_before_a_gap_is_freed_the_gap_says_nothing_of_it() -> None:
    segment = large((0, 10 * MIB), (30 * MIB, 10 * MIB))
    events = [event("free", 0), event("alloc", 10 * MIB + 1024, 2 * MIB)]
    assert blocks_of(settle_blocks([segment], events, DEFAULT))[0] == (0, 10 * MIB)


def test_a_block_too_large_to_be_split_has_its_segment_to_itself() -> None:
    settings = parse_alloc_conf("max_split_size_mb:30")
    assert blocks_of(settle_blocks([large((0, 30 * MIB))], [], settings)) == [(0, 40 * MIB)]
    assert blocks_of(settle_blocks([large((0, 29 * MIB))], [], settings)) == [(0, 29 * MIB)]


def test_small_and_expandable_segments_leave_no_slack() -> None:
    blocks = ((BASE, 512),)
    small = RecordedSegment(address=BASE, size=2 * MIB, stream=0, small=True, blocks=blocks)
    expandable = RecordedSegment(
        address=BASE, size=MIB, stream=0, small=False, expandable=True, blocks=blocks
    )
    assert settle_blocks([small], [], DEFAULT) == (small,)
    assert settle_blocks([expandable], [], DEFAULT) == (expandable,)


def stretches(segments: tuple[RecordedSegment, ...]) -> list[tuple[int, int, bool]]:
    return [(s.address - BASE, s.size, s.small) for s in segments if s.expandable]


def test_mapped_pages_go_and_unmapped_ones_come_back_joined() -> None:
    page = 20 * MIB
    final = (RecordedSegment(address=BASE, size=3 * page, stream=0, small=False, expandable=True),)
    events = [
        event("segment_unmap", 3 * page, 2 * page),
        event("segment_map", page, page),
    ]
    start = state_at_start(final, events, EXPANDABLE)
    assert stretches(start) == [(0, page, False), (2 * page, 3 * page, False)]


def test_unmapped_pages_are_of_the_size_that_they_were_mapped_in() -> None:
    """20 MiB may be one large page or ten small ones; the address had both in its time."""
    events = [event("segment_map", n * 2 * MIB, 2 * MIB) for n in range(10)]
    events.append(event("segment_unmap", 0, 20 * MIB))
    events.append(event("segment_map", 0, 20 * MIB))
    events.append(event("segment_unmap", 0, 20 * MIB))
    assert state_at_start((), events, EXPANDABLE) == ()
    assert stretches(state_at_start((), events[-1:], EXPANDABLE)) == [(0, 20 * MIB, False)]


def test_of_pages_mapped_before_the_trace_the_blocks_in_them_tell() -> None:
    """Nearby lies a stretch of the other pool, so the nearest known pages would mislead."""
    for size, small, neighbour in ((4096, True, 20 * MIB), (5 * MIB, False, 2 * MIB)):
        events = [
            event("free", 6 * MIB, size),
            event("segment_unmap", 0, 20 * MIB),
            event("segment_map", 20 * MIB, neighbour),
        ]
        assert stretches(state_at_start((), events, EXPANDABLE)) == [(0, 20 * MIB, small)]


def test_of_pages_that_nothing_lived_in_the_nearest_known_ones_tell() -> None:
    for size, small in ((2 * MIB, True), (40 * MIB, False)):
        events = [event("segment_unmap", 0, 20 * MIB), event("segment_map", 20 * MIB, size)]
        assert stretches(state_at_start((), events, EXPANDABLE)) == [(0, 20 * MIB, small)]


def test_pages_that_no_large_page_divides_are_small() -> None:
    start = state_at_start((), [event("segment_unmap", 0, 6 * MIB)], EXPANDABLE)
    assert stretches(start) == [(0, 6 * MIB, True)]


def test_an_allocation_at_a_wrong_address_takes_away_the_block_it_must_have_been() -> None:
    """Of two blocks of 5 MiB the one at 10 MiB has no allocation of its own."""
    final = (large((0, 5 * MIB), (10 * MIB, 5 * MIB)),)
    events = [
        event("free", 10 * MIB, 5 * MIB),
        event("alloc", 0, 5 * MIB),
        event("alloc", 1 * MIB, 5 * MIB),  # recorded at 1 instead of 10 MiB
    ]
    start = state_at_start(final, events, DEFAULT)
    assert blocks_of(start) == [(10 * MIB, 5 * MIB)]


def test_what_overlaps_through_damaged_events_is_left_out() -> None:
    final = (large((0, 5 * MIB)),)
    events = [
        event("segment_free", 20 * MIB, 40 * MIB),
        event("free", MIB, 2 * MIB),
        event("free", 39 * MIB, 4 * MIB),
    ]
    start = state_at_start(final, events, DEFAULT)
    assert [s.address for s in start] == [BASE]
    assert blocks_of(start) == [(0, 5 * MIB)]
