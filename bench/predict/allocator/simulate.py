"""Whole runs: events in, peaks out; and the smallest capacity at which a run completes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator.blocks import Block
from bench.predict.allocator.caching import CachingAllocator, Counters, OutOfMemory
from bench.units import MIB

__all__ = ["Event", "PhasePeaks", "SimulationResult", "needs_bytes", "simulate"]

# ("alloc", id, size, stream), ("free", id), ("phase", name), ("empty_cache",); also
# ("record_stream", id, stream) and ("complete_events", stream or None).
Event = tuple[Any, ...]

_GRANULE_BYTES = 2 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeaks:
    """The highest counters while one phase ran, over all its visits."""

    peak_requested_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_active_bytes: int = 0
    peak_reserved_bytes: int = 0

    def highest(self, other: PhasePeaks) -> PhasePeaks:
        """Return the higher of both, counter by counter."""
        return PhasePeaks(
            peak_requested_bytes=max(self.peak_requested_bytes, other.peak_requested_bytes),
            peak_allocated_bytes=max(self.peak_allocated_bytes, other.peak_allocated_bytes),
            peak_active_bytes=max(self.peak_active_bytes, other.peak_active_bytes),
            peak_reserved_bytes=max(self.peak_reserved_bytes, other.peak_reserved_bytes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult(PhasePeaks):
    """What a run gave; after an out-of-memory, what it gave until then.

    ``peak_allocated_at_event`` is the first event at which allocated bytes stood at their peak,
    -1 where nothing was allocated; ``oom_at_event`` the one that did not fit, None if all did.
    """

    phases: dict[str, PhasePeaks] = field(default_factory=dict)
    peak_allocated_at_event: int = -1
    oom_at_event: int | None = None
    oom_request_bytes: int | None = None
    num_alloc_retries: int = 0
    final: Counters


class _PeakBook:
    """Peaks by phase. Entering a phase resets the allocator's peaks to its counters."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self.phases: dict[str, PhasePeaks] = {}
        self.overall = PhasePeaks()
        self._phase: str | None = None

    def enter(self, phase: str) -> None:
        self.close()
        self.allocator.reset_peaks()
        self._phase = phase

    def close(self) -> None:
        allocator = self.allocator
        peaks = PhasePeaks(
            peak_requested_bytes=allocator.requested_peak_bytes,
            peak_allocated_bytes=allocator.allocated_peak_bytes,
            peak_active_bytes=allocator.active_peak_bytes,
            peak_reserved_bytes=allocator.reserved_peak_bytes,
        )
        self.overall = self.overall.highest(peaks)
        if self._phase is not None:
            self.phases[self._phase] = self.phases.get(self._phase, PhasePeaks()).highest(peaks)


def simulate(
    events: Iterable[Event],
    capacity_bytes: int | None = None,
    settings: AllocatorSettings | None = None,
    history: list[tuple[int, int]] | None = None,
) -> SimulationResult:
    """Run ``events`` through a fresh allocator of ``capacity_bytes`` (None: without limit).

    Stops at the first request that does not fit. A phase's peaks start from the counters at its
    entry; a phase entered again keeps the higher peaks. Where a list is given as ``history``, the
    (allocated, reserved) bytes once each event has run are added to it.

    Errors: ValueError for an event of no known kind and for freeing what is not allocated.
    """
    allocator = CachingAllocator(capacity_bytes, settings)
    malloc, free = allocator.malloc, allocator.free
    book = _PeakBook(allocator)
    live: dict[Any, Block | None] = {}
    highest = 0
    highest_at = -1
    oom_at: int | None = None
    oom_request: int | None = None
    for index, event in enumerate(events):
        kind = event[0]
        if kind == "alloc":
            try:
                live[event[1]] = malloc(event[2], event[3])
            except OutOfMemory as error:
                oom_at, oom_request = index, error.request_bytes
                break
            if allocator.allocated_bytes > highest:
                highest, highest_at = allocator.allocated_bytes, index
        elif kind == "free":
            if event[1] not in live:
                raise ValueError(f"event {index} frees {event[1]!r}, which is not allocated")
            free(live.pop(event[1]))
        elif kind == "phase":
            book.enter(event[1])
        else:
            _run_rare(allocator, live, event, index)
        if history is not None:
            history.append((allocator.allocated_bytes, allocator.reserved_bytes))
    book.close()
    return SimulationResult(
        **dataclasses.asdict(book.overall),
        phases=book.phases,
        peak_allocated_at_event=highest_at,
        oom_at_event=oom_at,
        oom_request_bytes=oom_request,
        num_alloc_retries=allocator.num_alloc_retries,
        final=allocator.counters,
    )


def _run_rare(
    allocator: CachingAllocator, live: dict[Any, Block | None], event: Event, index: int
) -> None:
    match event:
        case ("empty_cache",):
            allocator.empty_cache()
        case ("record_stream", name, stream):
            block = live[name]
            if block is not None:
                allocator.record_stream(block, stream)
        case ("complete_events", stream):
            allocator.complete_events(stream)
        case _:
            raise ValueError(f"event {index} is of no known kind: {event!r}")


def needs_bytes(events: Iterable[Event], settings: AllocatorSettings | None = None) -> int:
    """Return a smallest capacity, in steps of 2 MiB, at which ``events`` complete.

    What is promised: they complete at the figure returned and run out of memory at 2 MiB less.
    Fragmentation can make completion come and go as capacity grows, so a still smaller capacity
    may complete by luck. Found by bisection between the peak of requested bytes alive, below which
    nothing can complete (active bytes may be fewer in a tighter run, where other blocks are split),
    and the reserved peak without limit. 0 if nothing is allocated.
    """
    events = list(events)
    settings = settings or AllocatorSettings()
    alive = _peak_alive_bytes(events)
    if not alive:
        return 0
    too_small = (alive - 1) // _GRANULE_BYTES * _GRANULE_BYTES
    enough = _granules(simulate(events, None, settings).peak_reserved_bytes)
    # Reserving less than the capacity is no proof of room where a share of it has to be enough, or
    # where segments that are not whole granules take more of it than they reserve.
    share = settings.per_process_memory_fraction
    indirect = share < 1.0 or settings.large_segment_size_bytes % _GRANULE_BYTES > 0
    if indirect:
        enough = _granules(int(enough / share) + 1)
        while simulate(events, enough, settings).oom_at_event is not None:
            too_small, enough = enough, _granules(enough + enough // 4)
    while enough - too_small > _GRANULE_BYTES:
        middle = (too_small + enough) // 2 // _GRANULE_BYTES * _GRANULE_BYTES
        run = simulate(events, middle, settings)
        if run.oom_at_event is not None:
            too_small = middle
        elif indirect:
            enough = middle
        else:
            # A run that never reserved more than this would have gone the same way with this.
            enough = _granules(run.peak_reserved_bytes)
    return enough


def _peak_alive_bytes(events: Iterable[Event]) -> int:
    sizes: dict[Any, int] = {}
    alive = highest = 0
    for event in events:
        if event[0] == "alloc":
            sizes[event[1]] = event[2]
            alive += event[2]
            highest = max(highest, alive)
        elif event[0] == "free":
            alive -= sizes.pop(event[1], 0)
    return highest


def _granules(size_bytes: int) -> int:
    return -(-size_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
