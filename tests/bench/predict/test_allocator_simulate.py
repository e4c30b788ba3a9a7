"""Whole runs, what they need, and what must hold in any of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.predict.alloc_conf import parse_alloc_conf
from bench.predict.allocator import (
    Block,
    CachingAllocator,
    Counters,
    OutOfMemory,
    PhasePeaks,
    needs_bytes,
    simulate,
)
from bench.units import MIB
from tests.bench.predict.random_runs import SETUPS, random_actions

SETTINGS = [setup.settings for setup in SETUPS.values()]


def random_events(seed: int, count: int) -> list[tuple[Any, ...]]:
    """Events of the kind that the tracer makes; every allocation has its own id."""
    events: list[tuple[Any, ...]] = [("phase", "model")]
    live: list[int] = []
    for number, action in enumerate(random_actions(seed, count)):
        if action[0] == "alloc":
            events.append(("alloc", number, action[1], action[2]))
            live.append(number)
        elif action[0] == "free" and live:
            events.append(("free", live.pop(int(action[1] * len(live)))))
        elif action[0] == "stream_done":
            events.append(("phase", f"phase {number % 3}"))
        elif action[0] == "empty_cache":
            events.append(("empty_cache",))
    return events


def test_peaks_by_phase_start_from_the_counters_at_entry() -> None:
    result = simulate(
        [
            ("alloc", "before", 2 * MIB, 0),
            ("phase", "forward"),
            ("alloc", "a", 30 * MIB, 0),
            ("free", "a"),
            ("phase", "backward"),
            ("alloc", "b", 10 * MIB, 0),
            ("free", "b"),
            ("phase", "forward"),
            ("alloc", "c", 23 * MIB // 2, 0),
        ]
    )
    # Backward: 2 MiB live, 18 cached beside it, 30 cached whole, of which b takes 10.
    assert result.phases == {
        "forward": PhasePeaks(
            peak_requested_bytes=32 * MIB,
            peak_allocated_bytes=32 * MIB,
            peak_active_bytes=32 * MIB,
            peak_reserved_bytes=50 * MIB,
        ),
        "backward": PhasePeaks(
            peak_requested_bytes=12 * MIB,
            peak_allocated_bytes=12 * MIB,
            peak_active_bytes=12 * MIB,
            peak_reserved_bytes=50 * MIB,
        ),
    }
    assert result.peak_allocated_bytes == 32 * MIB
    assert result.peak_allocated_at_event == 2
    assert result.final == Counters(
        requested_bytes=27 * MIB // 2,
        allocated_bytes=27 * MIB // 2,
        active_bytes=27 * MIB // 2,
        reserved_bytes=50 * MIB,
    )
    assert (result.oom_at_event, result.num_alloc_retries) == (None, 0)


def test_what_happens_before_the_first_phase_counts_for_the_whole_run_only() -> None:
    events = [("alloc", 0, 30 * MIB, 0), ("free", 0), ("empty_cache",), ("phase", "forward")]
    result = simulate(events)
    assert result.peak_reserved_bytes == 30 * MIB
    assert result.phases == {"forward": PhasePeaks()}


def test_the_first_of_equal_peaks_is_named() -> None:
    events = [("alloc", 0, 512, 0), ("free", 0), ("alloc", 1, 512, 0), ("alloc", 2, 0, 0)]
    assert simulate(events).peak_allocated_at_event == 0
    assert simulate([("alloc", 0, 0, 0), ("free", 0)]).peak_allocated_at_event == -1


def test_a_run_stops_at_the_request_that_does_not_fit() -> None:
    events = [
        ("phase", "forward"),
        ("alloc", 0, 30 * MIB, 0),
        ("alloc", 1, 11 * MIB, 0),
        ("free", 0),
    ]
    result = simulate(events, 41 * MIB)
    assert (result.oom_at_event, result.oom_request_bytes) == (2, 11 * MIB)
    assert result.final.allocated_bytes == result.peak_allocated_bytes == 30 * MIB
    assert result.phases["forward"].peak_reserved_bytes == 30 * MIB
    assert result.num_alloc_retries == 1
    assert simulate(events, 42 * MIB).oom_at_event is None


def test_streams_can_be_followed() -> None:
    events: list[tuple[Any, ...]] = [
        ("alloc", "a", 14 * MIB, 0),
        ("alloc", "nothing", 0, 0),
        ("record_stream", "a", 1),
        ("record_stream", "nothing", 1),
        ("free", "a"),
        ("alloc", "b", 14 * MIB, 0),
        ("complete_events", None),
        ("alloc", "c", 14 * MIB, 0),
    ]
    result = simulate(events)
    assert result.peak_active_bytes == result.peak_reserved_bytes == 28 * MIB


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([("alloc", 0, 1, 0), ("free", 1)], "event 1 frees 1"),
        ([("alloc", 0, 1, 0), ("free", 0), ("free", 0)], "event 2 frees 0"),
        ([("realloc", 0)], "event 0 is of no known kind"),
    ],
)
def test_events_that_make_no_sense_are_errors(events: list[tuple[Any, ...]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        simulate(events)


def test_a_run_needs_its_segments_when_nothing_is_cached() -> None:
    assert needs_bytes([("alloc", 0, 23 * MIB // 2, 0), ("alloc", 1, 1, 0)]) == 14 * MIB


def test_a_run_needs_less_than_it_reserves_without_limit() -> None:
    """30 MiB are cached when 32 are asked for; under pressure they are given back."""
    events = [("alloc", 0, 30 * MIB, 0), ("free", 0), ("alloc", 1, 32 * MIB, 0)]
    assert simulate(events).peak_reserved_bytes == 62 * MIB
    assert needs_bytes(events) == 32 * MIB


def test_a_run_needs_more_than_its_tensors_where_they_fragment() -> None:
    """Two segments of 20 MiB, each kept by one piece of 5: 56 MiB for 26 of tensors."""
    events: list[tuple[Any, ...]] = [("alloc", n, 5 * MIB, 0) for n in range(8)]
    events += [("free", n) for n in range(8) if n not in (0, 4)]
    events += [("alloc", 9, 16 * MIB, 0)]
    assert needs_bytes(events) == 56 * MIB


def test_nothing_needs_nothing() -> None:
    assert needs_bytes([("phase", "forward"), ("alloc", 0, 0, 0)]) == 0


def test_with_a_share_the_card_has_to_be_larger() -> None:
    settings_ = parse_alloc_conf("per_process_memory_fraction:0.5")
    assert needs_bytes([("alloc", 0, 30 * MIB, 0)], settings_) == 60 * MIB


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), which=st.sampled_from(SETTINGS))
@example(seed=566, which=SETUPS["max_split"].settings)  # needs less than its free run's active peak
def test_a_run_completes_at_what_it_needs_and_not_at_a_step_less(seed: int, which: Any) -> None:
    events = random_events(seed, 60)
    needed = needs_bytes(events, which)
    assert needed % (2 * MIB) == 0
    assert simulate(events, needed, which).oom_at_event is None
    if needed:
        assert simulate(events, needed - 2 * MIB, which).oom_at_event is not None


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), which=st.sampled_from(SETTINGS))
def test_the_counters_keep_their_order_and_live_blocks_never_overlap(seed: int, which: Any) -> None:
    allocator = CachingAllocator(240 * MIB, which)
    live: dict[int, Block] = {}
    for event in random_events(seed, 120):
        if event[0] == "alloc":
            try:
                block = allocator.malloc(event[2], event[3])
            except OutOfMemory:
                continue
            assert block is not None
            live[event[1]] = block
        elif event[0] == "free" and event[1] in live:
            allocator.free(live.pop(event[1]))
        elif event[0] == "empty_cache":
            allocator.empty_cache()
        counters = allocator.counters
        assert counters.requested_bytes <= counters.allocated_bytes
        assert (
            counters.allocated_bytes == counters.active_bytes == sum(b.size for b in live.values())
        )
        assert counters.active_bytes <= counters.reserved_bytes <= 240 * MIB
        spans = sorted((b.address, b.address + b.size) for b in live.values())
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
    for block in live.values():
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.counters == Counters(
        requested_bytes=0, allocated_bytes=0, active_bytes=0, reserved_bytes=0
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9), which=st.sampled_from(SETTINGS))
def test_the_run_peaks_at_the_highest_of_its_phases(seed: int, which: Any) -> None:
    result = simulate(random_events(seed, 100), 240 * MIB, which)
    for name in ("requested", "allocated", "active", "reserved"):
        key = f"peak_{name}_bytes"
        assert getattr(result, key) == max(getattr(p, key) for p in result.phases.values())
