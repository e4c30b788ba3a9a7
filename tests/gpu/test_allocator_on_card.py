"""The allocator simulator against torch's own allocator, event by event."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from bench.predict.alloc_conf import parse_alloc_conf
from bench.predict.allocator import Block, CachingAllocator, OutOfMemory
from bench.predict.replay import replay
from bench.predict.trace_file import read_trace
from bench.units import GIB, KIB, MIB
from tests.gpu.cases import small_case
from tests.gpu.fresh import COUNTERS, in_fresh_process, run_events, train_recorded

pytestmark = pytest.mark.gpu

LIVE_LIMIT_BYTES = 3 * GIB


def random_events(seed: int, count: int = 1500) -> list[list[Any]]:
    """Allocations of all size classes on two streams, half of them of a few sizes that recur."""
    draw = random.Random(seed)
    recurring = [draw.randint(1, 40 * MIB) for _ in range(8)]
    live: dict[int, int] = {}
    events: list[list[Any]] = []
    for name in range(count):
        largest = draw.choice([KIB, MIB, 10 * MIB, 100 * MIB])
        size = draw.choice(recurring) if draw.random() < 0.5 else draw.randint(1, largest)
        while live and (draw.random() < 0.48 or sum(live.values()) + size > LIVE_LIMIT_BYTES):
            freed = draw.choice(list(live))
            del live[freed]
            events.append(["free", freed])
        events.append(["alloc", name, size, int(draw.random() < 0.1)])
        live[name] = size
        if draw.random() < 0.005:
            events.append(["empty_cache"])
    return events


def simulated(events: list[list[Any]], allocator: CachingAllocator) -> list[list[int | None]]:
    """The rows that ``run_events`` gave, as the simulator has them."""
    live: dict[int, Block | None] = {}
    rows: list[list[int | None]] = []
    for event in events:
        address = None
        if event[0] == "alloc":
            _, name, size, stream = event
            try:
                block = live[name] = allocator.malloc(size, stream)
                address = block.address if block is not None else None
            except OutOfMemory:
                pass
        elif event[0] == "free":
            allocator.free(live.pop(event[1], None))
        else:
            allocator.empty_cache()
        counters = dataclasses.asdict(allocator.counters)
        rows.append([address, *(counters[name] for name in COUNTERS)])
    return rows


def first_difference(expected: list[Any], actual: list[Any], skip: int = 0) -> str:
    """Where two runs part, for people; empty when they do not."""
    for place, (one, other) in enumerate(zip(expected, actual, strict=True)):
        if one[skip:] != other[skip:]:
            return f"event {place}: the GPU had {one}, the simulator {other}"
    return ""


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("conf", "limit_bytes"),
    [
        ("", None),
        # Less than the events hold: the cache is given back, and some requests do not fit.
        ("", 640 * MIB),
        ("max_split_size_mb:32", 640 * MIB),
        ("roundup_power2_divisions:4", None),
        ("garbage_collection_threshold:0.6", 768 * MIB),
        ("expandable_segments:True", None),
        ("expandable_segments:True", 640 * MIB),
    ],
    ids=str,
)
def test_random_runs_leave_the_simulator_where_they_leave_the_gpu(
    conf: str, limit_bytes: int | None, seed: int
) -> None:
    """Addresses and all four counters after every event, peaks, retries and refusals at the end."""
    events = random_events(seed)
    environment = {"PYTORCH_ALLOC_CONF": conf}
    measured = in_fresh_process(run_events, environment, events=events, limit_bytes=limit_bytes)
    total_bytes = measured["total_bytes"]
    settings = parse_alloc_conf(conf)
    if limit_bytes is not None:
        share = limit_bytes / total_bytes
        settings = dataclasses.replace(settings, per_process_memory_fraction=share)
    recorded = iter(measured["segments"])
    allocator = CachingAllocator(
        None,
        settings,
        device_total_bytes=total_bytes,
        # Ties between equal blocks break by address, so segments lie where the driver put them.
        place_segment=None
        if settings.expandable_segments
        else lambda _size, _pool, _stream: next(recorded, 0),
    )
    if limit_bytes is not None:
        allocator.allowed_bytes = limit_bytes

    rows = simulated(events, allocator)

    # The address space of an expandable segment is the driver's choice, and not recorded.
    skip = int(settings.expandable_segments)
    assert first_difference(measured["rows"], rows, skip) == ""
    assert measured["peaks"] == [
        allocator.requested_peak_bytes,
        allocator.allocated_peak_bytes,
        allocator.active_peak_bytes,
        allocator.reserved_peak_bytes,
    ]
    assert (measured["retries"], measured["ooms"]) == (
        allocator.num_alloc_retries,
        allocator.num_ooms,
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_training_steps_snapshot_replays_with_every_address(
    tmp_path: Path, precision: Any
) -> None:
    path = tmp_path / "snapshot.pickle"
    case = small_case(precision=precision)
    environment = {"PYTORCH_ALLOC_CONF": ""}

    reserved = in_fresh_process(
        train_recorded, environment, case=case.to_definition(), path=str(path)
    )
    result = replay(read_trace(path))

    assert result.allocations > 200
    assert result.addresses_exact == result.allocations
    assert result.exact
    assert result.reserved_peak_bytes == reserved
