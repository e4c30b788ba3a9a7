"""The timeline of a simulated run: few points, and every peak among them exactly."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bench.predict.allocator import simulate
from bench.predict.step_trace import Site, Trace
from bench.predict.timeline import History, make_timeline
from bench.timeline import Timeline
from bench.units import MIB

SITE = Site("block", "aten.empty", "net.py:1")
CATEGORIES: list[Any] = ["parameter", "activation", "temporary", "gradient"]


def random_trace(seed: int, steps: int) -> Trace:
    """Return phases in which blocks of odd sizes come and go."""
    rng = random.Random(seed)
    trace = Trace()
    live: list[int] = []
    for phase in ("model", "forward", "backward", "optimizer"):
        trace.events.append(("phase", phase))
        for _ in range(steps):
            if live and rng.random() < 0.45:
                trace.events.append(("free", live.pop(rng.randrange(len(live)))))
            else:
                live.append(len(trace.sites))
                trace.events.append(("alloc", live[-1], rng.randrange(1, 3 * MIB), 0))
                trace.sites.append(SITE)
                trace.categories.append(rng.choice(CATEGORIES))
    return trace


def run(trace: Trace, capacity: int | None = None) -> tuple[Any, Timeline]:
    history: History = []
    result = simulate(trace.events, capacity, None, history)
    timeline = make_timeline(trace, history, result.oom_at_event)
    assert timeline is not None
    return result, timeline


@pytest.mark.parametrize("seed", range(8))
def test_the_highest_points_are_the_peaks_exactly(seed: int) -> None:
    result, timeline = run(random_trace(seed, 300))
    assert max(timeline.requested_bytes()) == result.peak_requested_bytes
    assert max(timeline.allocated_bytes()) == result.peak_allocated_bytes
    assert max(timeline.reserved_bytes()) == result.peak_reserved_bytes
    assert result.peak_allocated_at_event in timeline.events


@pytest.mark.parametrize("seed", range(8))
def test_every_phase_s_peak_is_exact(seed: int) -> None:
    """Within a phase the counters start from what its first event left, as the peaks do."""
    result, timeline = run(random_trace(seed, 300))
    begins = [event for _, event in timeline.phases]
    for (name, begin), end in zip(timeline.phases, [*begins[1:], 10**9], strict=True):
        within = [i for i, event in enumerate(timeline.events) if begin <= event < end]
        highest = max(timeline.allocated_bytes()[i] for i in within)
        assert highest == result.phases[name].peak_allocated_bytes


@pytest.mark.parametrize("steps", [1, 7, 300, 20_000])
def test_there_are_at_most_two_hundred_points(steps: int) -> None:
    trace = random_trace(0, steps)
    _, timeline = run(trace)
    assert len(timeline.events) <= 200
    assert timeline.events[0] == 0
    assert timeline.events[-1] == len(trace.events) - 1
    assert list(timeline.events) == sorted(set(timeline.events))


def test_a_run_by_hand() -> None:
    """A weight of 1000 bytes, an activation of 2000, freed: 3000 requested, 1024 + 2048 held."""
    trace = Trace(
        events=[
            *(("phase", "model"), ("alloc", 0, 1000, 0), ("phase", "forward")),
            *(("alloc", 1, 2000, 0), ("free", 1)),
        ],
        sites=[SITE, SITE],
        categories=["parameter", "activation"],
    )
    _, timeline = run(trace)
    assert timeline.events == (0, 1, 2, 3, 4)
    assert timeline.phases == (("model", 0), ("forward", 2))
    assert timeline.held_bytes() == {
        "parameter": (0, 1000, 1000, 1000, 1000),
        "activation": (0, 0, 0, 2000, 0),
    }
    assert timeline.allocated_bytes() == (0, 1024, 1024, 1024 + 2048, 1024)
    assert timeline.reserved_bytes() == (0, 2 * MIB, 2 * MIB, 2 * MIB, 2 * MIB)


def test_a_run_that_does_not_fit_goes_on_as_on_a_larger_card() -> None:
    trace = random_trace(3, 300)
    whole, _ = run(trace)
    result, timeline = run(trace, whole.peak_reserved_bytes // 2)
    assert timeline.oom_event == result.oom_at_event is not None
    assert max(timeline.requested_bytes()) == whole.peak_requested_bytes
    assert timeline.allocated_bytes() == ()


def test_a_trace_that_allocates_nothing_has_no_timeline() -> None:
    assert make_timeline(Trace(events=[("phase", "model")]), [(0, 0)], None) is None
