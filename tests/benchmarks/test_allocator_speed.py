"""How fast the simulator is. The aim: at least 200,000 events a second, on one core."""

from __future__ import annotations

from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import needs_bytes, simulate
from bench.units import KIB, MIB

STEPS = 20
LAYERS = 120


def training_events() -> list[tuple[Any, ...]]:
    """Steps of a network: activations kept layer by layer, temporaries, freed in reverse."""
    events: list[tuple[Any, ...]] = []
    name = 0
    for _ in range(STEPS):
        events.append(("phase", "forward"))
        kept = []
        for layer in range(LAYERS):
            size = (64 >> layer % 6) * MIB + layer * 4 * KIB
            for which in (size, size // 3, 4 * KIB):
                name += 1
                events.append(("alloc", name, which, 0))
            kept += [name - 2, name]
            events.append(("free", name - 1))
        events.append(("phase", "backward"))
        for tensor in reversed(kept):
            name += 1
            events += [("alloc", name, 9 * MIB // 2, 0), ("free", tensor), ("free", name)]
    return events


def test_simulating_training_steps(benchmark: BenchmarkFixture) -> None:
    events = training_events()
    result = benchmark.pedantic(simulate, (events,), rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert result.oom_at_event is None
    if benchmark.stats:  # absent where benchmarks are disabled
        benchmark.extra_info["events_per_s"] = len(events) / benchmark.stats.stats.median


def test_simulating_training_steps_with_expandable_segments(benchmark: BenchmarkFixture) -> None:
    events = training_events()
    settings = AllocatorSettings(expandable_segments=True)
    result = benchmark.pedantic(simulate, (events, None, settings), rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert result.oom_at_event is None
    if benchmark.stats:
        benchmark.extra_info["events_per_s"] = len(events) / benchmark.stats.stats.median


def test_finding_what_training_steps_need(benchmark: BenchmarkFixture) -> None:
    events = training_events()
    needed = benchmark.pedantic(needs_bytes, (events,), rounds=2, warmup_rounds=0)  # type: ignore[no-untyped-call]
    assert simulate(events, needed).oom_at_event is None
