"""Replays: exact where the trace is whole, robust where it is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.fit import fit
from bench.predict.reduced_trace import reduced_trace
from bench.predict.replay import ReplayResult, replay
from bench.predict.snapshot import snapshot_trace
from bench.predict.trace_file import read_trace
from bench.units import GIB, MIB
from tests.bench.predict.random_runs import SETUPS, Setup
from tests.bench.predict.reference_allocator import ReferenceAllocator, ReferenceOutOfMemory
from tests.bench.predict.snapshots import (
    RECORDED,
    random_snapshot,
    recorded_data,
    recorded_path,
    shift_addresses,
    snapshot_of,
)

ALLOCATIONS = {
    "cnn_train_loop": 1935,
    "transformer_2.7b_forward": 2058,
    "transformer_2.7b_train_step": 6771,
}


def replay_snapshot(snapshot: dict[str, Any], capacity: int | None = None) -> ReplayResult:
    return replay(snapshot_trace(snapshot, None), capacity)


@pytest.mark.parametrize("name", RECORDED)
def test_every_address_of_the_recorded_traces_is_exact(name: str) -> None:
    result = replay(read_trace(recorded_path(name)))
    assert result.exact
    assert result.addresses_exact == result.allocations == ALLOCATIONS[name]
    expected = recorded_data(name)["expected"]
    assert result.reserved_start_bytes == expected["reserved_at_start_bytes"]
    assert result.reserved_peak_bytes == expected["peak_reserved_bytes"]
    assert result.reserved_end_bytes == expected["final_reserved_bytes"]


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("frees_too", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_ten_shifted_addresses_cost_about_ten_allocations(
    name: str, frees_too: bool, seed: int
) -> None:
    data = recorded_data(name)
    shift_addresses(data["events"], "alloc", 10, seed, frees_too)
    result = replay(reduced_trace(data, None))
    assert not result.exact
    # Two blocks at one address cannot be told apart, so a few more may be lost.
    assert result.allocations - 30 <= result.addresses_exact <= result.allocations - 10


@pytest.mark.parametrize("kind", ["free", "segment_alloc", "alloc"])
@pytest.mark.parametrize("seed", range(3))
def test_other_damage_is_survived(kind: str, seed: int) -> None:
    data = recorded_data("cnn_train_loop")
    shift_addresses(data["events"], kind, 5, seed)
    result = replay(reduced_trace(data, None))
    assert 0.5 * result.allocations < result.addresses_exact <= result.allocations


@pytest.mark.parametrize("name", SETUPS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 200), streams=st.integers(1, 3))
def test_snapshots_of_whole_runs_replay_exactly(name: str, seed: int, streams: int) -> None:
    result = replay_snapshot(random_snapshot(SETUPS[name], seed, streams=streams))
    assert result.exact
    assert result.reserved_start_bytes == 0


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_snapshots_whose_history_was_cut_replay_from_the_state_that_follows(
    name: str, keep: float
) -> None:
    """What a block was charged is lost where it was freed; the rest of the state follows."""
    lost = total = 0
    for seed in range(8):
        result = replay_snapshot(random_snapshot(SETUPS[name], seed, keep=keep))
        total += result.allocations
        lost += result.allocations - result.addresses_exact
        assert result.reserved_start_bytes == result.recorded_reserved_start_bytes > 0
    assert total > 80
    assert lost <= 0.03 * total


def test_the_run_that_the_others_are_tested_with_meets_all_kinds_of_events() -> None:
    """Guards the two tests above."""
    kinds = {
        event["action"]
        for setup in SETUPS.values()
        for event in random_snapshot(setup, 3)["device_traces"][0]
    }
    assert kinds == {
        *("alloc", "free_requested", "free_completed", "oom"),
        *("segment_alloc", "segment_free", "segment_map", "segment_unmap"),
    }


def test_a_wrong_rule_would_show() -> None:
    """Guards all of the above: the same trace, told to have had other settings."""
    snapshot = random_snapshot(SETUPS["roundup"], 1)
    snapshot["allocator_settings"] = {}
    assert not replay_snapshot(snapshot).exact


@pytest.mark.parametrize("name", ["tight", "expandable_tight", "max_split"])
def test_damaged_snapshots_never_crash(name: str) -> None:
    snapshot = random_snapshot(SETUPS[name], 5)
    for seed in range(6):
        damaged = copy.deepcopy(snapshot)
        trace = damaged["device_traces"][0]
        for place in range(seed, len(trace), 7):
            key = ("addr", "size", "stream")[place % 3]
            if key in trace[place]:
                trace[place][key] = (trace[place][key] * 3 + 512) % (1 << 47)
        result = replay_snapshot(damaged, 64 * MIB)
        assert not result.exact
        assert result.addresses_exact <= result.allocations


def test_reserved_figures_count_towards_exactness() -> None:
    trace = snapshot_trace(random_snapshot(SETUPS["default"], 2), None)
    result = replay(trace)
    assert result.exact
    for moment in ("start", "peak", "end"):
        wrong = {f"recorded_reserved_{moment}_bytes": 1}
        fields = {**result.to_dict(), **wrong}
        assert not ReplayResult(**fields).exact


def test_the_json_keys_are_the_documented_ones() -> None:
    trace = snapshot_trace(random_snapshot(SETUPS["default"], 2), None)
    keys = {
        *("allocations", "addresses_exact"),
        *(f"reserved_{moment}_bytes" for moment in ("start", "peak", "end")),
        *(f"recorded_reserved_{moment}_bytes" for moment in ("start", "peak", "end")),
    }
    assert replay(trace).to_dict().keys() == keys
    assert replay(trace, 4 * GIB).to_dict().keys() == keys | {"fits", "oom_at_event"}


class TestFit:
    def run(self, reference: ReferenceAllocator) -> dict[str, Any]:
        """20 MiB live, 30 cached whole at the start; then 12, an emptied cache, and 34."""
        reference.malloc(20 * MIB)
        reference.free(reference.malloc(30 * MIB))
        reference.trace.clear()
        twelve = reference.malloc(12 * MIB)  # out of the 30
        reference.free(twelve)
        reference.release_all()
        reference.malloc(34 * MIB)
        return snapshot_of(reference)

    @pytest.mark.parametrize(
        ("capacity", "fits", "oom_at"),
        [
            (54 * MIB, True, None),
            (54 * MIB - 1, False, 5),
            (32 * MIB, False, 5),
            (32 * MIB - 1, False, 0),
            (20 * MIB, False, 0),
            (20 * MIB - 1, False, 0),
        ],
    )
    def test_the_state_at_the_start_is_part_of_the_run(
        self, capacity: int, fits: bool, oom_at: int | None
    ) -> None:
        trace = snapshot_trace(self.run(ReferenceAllocator()), None)
        result = fit(trace, capacity)
        assert (result.fits, result.oom_at_event) == (fits, oom_at)

    def test_a_recorded_out_of_memory_does_not_fit_its_own_capacity(self) -> None:
        reference = ReferenceAllocator(capacity=60 * MIB)
        reference.malloc(40 * MIB)
        with pytest.raises(ReferenceOutOfMemory):
            reference.malloc(30 * MIB)
        trace = snapshot_trace(snapshot_of(reference), None)
        assert replay(trace).exact
        assert fit(trace, 60 * MIB).oom_at_event == 2  # segment_alloc, alloc, oom
        assert fit(trace, 70 * MIB).fits

    def test_blocks_that_wait_for_a_stream_take_their_place(self) -> None:
        reference = ReferenceAllocator()
        reference.free(reference.malloc(30 * MIB), used_on={1})
        reference.malloc(20 * MIB)
        reference.stream_done()
        reference.malloc(20 * MIB)
        trace = snapshot_trace(snapshot_of(reference), None)
        assert fit(trace, 60 * MIB).fits
        # At 50 MiB the second 20 would have to wait for the 30, and gets their memory.
        assert fit(trace, 50 * MIB).fits
        assert fit(trace, 49 * MIB).fits
        assert fit(trace, 40 * MIB).fits
        assert not fit(trace, 39 * MIB).fits

    def test_at_the_recorded_capacity_the_run_ends_as_recorded(self) -> None:
        disagreements = 0
        for seed in range(30):
            setup = SETUPS["tight"]
            trace = snapshot_trace(random_snapshot(setup, seed), None)
            assert setup.capacity is not None
            ran_out = any(event.kind == "oom" for event in trace.events)
            disagreements += fit(trace, setup.capacity).fits == ran_out
        # An emptied cache cannot always be told from a release under pressure.
        assert disagreements <= 1

    def test_new_segments_go_where_they_went(self) -> None:
        """1.5 MiB are free in a segment of 20 MiB and in a later one of 12 that lies lower."""
        reference = ReferenceAllocator()
        small = reference.malloc(1)
        low = reference.malloc(40 * MIB)
        first = reference.malloc(37 * MIB // 2)
        reference.free(low)
        reference.release_all()
        reference.free(small)  # parts the release from the next segment: it is the program's
        second = reference.malloc(21 * MIB // 2)
        reference.malloc(3 * MIB // 2)
        reference.free(first)
        reference.free(second)
        reference.release_all()
        trace = snapshot_trace(snapshot_of(reference), None)
        assert trace.reserved_end_bytes == 12 * MIB
        assert fit(trace, GIB).reserved_end_bytes == 12 * MIB

    def test_a_cache_that_the_program_emptied_is_emptied(self) -> None:
        """72 MiB had been reserved before: no pressure made 30 MiB go for 12."""
        reference = ReferenceAllocator()
        reference.free(reference.malloc(72 * MIB))
        reference.release_all()
        reference.free(reference.malloc(30 * MIB))
        reference.release_all()
        reference.malloc(12 * MIB)
        trace = snapshot_trace(snapshot_of(reference), None)
        assert fit(trace, GIB).reserved_end_bytes == 12 * MIB

    @pytest.mark.parametrize(("by_user", "end"), [(False, 30 * MIB), (True, 12 * MIB)])
    def test_a_release_under_pressure_is_not_repeated_where_there_is_none(
        self, by_user: bool, end: int
    ) -> None:
        reference = ReferenceAllocator(capacity=40 * MIB)
        thirty = reference.malloc(30 * MIB)
        reference.free(thirty)
        reference.release_all()
        reference.malloc(12 * MIB)
        snapshot = snapshot_of(reference)
        for entry in snapshot["device_traces"][0]:
            if entry["action"] == "segment_free" and by_user:
                entry["frames"] = [{"name": "empty_cache", "filename": "", "line": 1}]
        # Kept, the 30 MiB hold the 12; the trace alone cannot tell that there was no pressure.
        assert fit(snapshot_trace(snapshot, None), GIB).reserved_end_bytes == end

    def test_the_share_of_the_process_is_of_the_whole_card(self) -> None:
        shared = Setup(settings=AllocatorSettings(per_process_memory_fraction=0.5))
        reference = shared.reference()
        reference.malloc(30 * MIB)
        trace = snapshot_trace(snapshot_of(reference), None)
        assert fit(trace, 59 * MIB, device_total_bytes=60 * MIB).fits
        assert not fit(trace, 58 * MIB, device_total_bytes=59 * MIB).fits

    def test_where_nothing_fits_not_even_the_first_event_is_reached(self) -> None:
        trace = read_trace(recorded_path("transformer_2.7b_forward"))
        assert fit(trace, 4 * GIB).oom_at_event == 0
        assert fit(trace, trace.reserved_peak_bytes).fits


def test_private_pools_are_replayed_by_the_pool_that_an_address_lies_in() -> None:
    """Without ``pool_id`` in the events, as older versions wrote them."""
    entries: list[dict[str, Any]] = [
        {"action": "segment_alloc", "addr": 1 << 32, "size": 20 * MIB, "stream": 0},
        {"action": "alloc", "addr": 1 << 32, "size": 4 * MIB, "stream": 0},
        {"action": "segment_alloc", "addr": 2 << 32, "size": 20 * MIB, "stream": 0},
        {"action": "alloc", "addr": 2 << 32, "size": 2 * MIB, "stream": 0},
        {"action": "alloc", "addr": (2 << 32) + 2 * MIB, "size": 2 * MIB, "stream": 0},
    ]
    blocks = {1 << 32: [4], 2 << 32: [2, 2]}
    segments = []
    for pool, (address, sizes) in enumerate(blocks.items()):
        pieces = [{"size": size * MIB, "state": "active_allocated"} for size in sizes]
        pieces.append({"size": (20 - sum(sizes)) * MIB, "state": "inactive"})
        segments.append(
            {
                "address": address,
                "total_size": 20 * MIB,
                "stream": 0,
                "segment_type": "large",
                "segment_pool_id": (0, pool),
                "blocks": pieces,
            }
        )
    snapshot = {"segments": segments, "device_traces": [entries]}
    assert replay_snapshot(snapshot).exact
    for entry in entries:  # as newer versions write them
        entry["pool_id"] = (0, 1) if entry["addr"] >= 2 << 32 else (0, 0)
    assert replay_snapshot(snapshot).exact


def test_a_retry_takes_new_memory_though_its_wait_has_set_some_free() -> None:
    """40 MiB: 18 wait for a stream. 19 do not fit; the retry waits, releases, and asks anew."""
    reference = ReferenceAllocator(capacity=42 * MIB)
    reference.free(reference.malloc(18 * MIB), used_on={1})
    reference.free(reference.malloc(20 * MIB))
    reference.malloc(22 * MIB)
    assert reference.retries == 1
    assert replay_snapshot(snapshot_of(reference)).exact


def test_expandable_segments_switched_on_in_the_middle_are_followed() -> None:
    reference = ReferenceAllocator(range_bytes=1 << 40)
    for expandable in (False, True, False):
        reference.expandable = expandable
        kept = reference.malloc(5 * MIB, stream=int(expandable))
        reference.malloc(30 * MIB, stream=int(expandable))
        reference.free(kept)
    assert replay_snapshot(snapshot_of(reference)).exact
