"""Whether a traced run would have fitted elsewhere: the same events at another capacity."""

from __future__ import annotations

from dataclasses import dataclass

from bench.predict.allocator import Block, CachingAllocator, OutOfMemory
from bench.predict.recorded_state import LiveBlocks, Placement, first_modes, restore_state
from bench.predict.trace import Trace, TraceEvent

__all__ = ["Fit", "fit"]

_NEW = ("segment_alloc", "segment_map")
_RELEASES = ("segment_free", "segment_unmap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """``oom_at_event``: the place in the file's list of events of the request that did not fit.

    It is 0 where already the state at the start is too large, None where everything fits.
    """

    fits: bool
    oom_at_event: int | None
    reserved_peak_bytes: int
    reserved_end_bytes: int


def fit(trace: Trace, capacity_bytes: int, device_total_bytes: int | None = None) -> Fit:
    """Run the trace at ``capacity_bytes``, on a card of ``device_total_bytes`` if that is known.

    The state at the start is included, at its recorded addresses; what is cached of it is given
    back first if it must be. A request that ran out of memory when recorded has to fit too, and
    is then taken to be freed at once. Caches that the program emptied are emptied here; releases
    under pressure are the simulator's own.
    """
    placement = Placement(trace)
    allocator = CachingAllocator(
        capacity_bytes,
        trace.settings,
        device_total_bytes=device_total_bytes,
        place_segment=lambda size, _pool, _stream: placement(allocator, size),
    )
    live = restore_state(allocator, trace)
    if allocator.reserved_bytes > capacity_bytes:
        allocator.empty_cache()
        allocator.reset_peaks()
    oom_at_event = 0 if allocator.reserved_bytes > capacity_bytes else None
    if oom_at_event is None:
        oom_at_event = _first_failure(allocator, live, placement, trace)
    return Fit(
        fits=oom_at_event is None,
        oom_at_event=oom_at_event,
        reserved_peak_bytes=allocator.reserved_peak_bytes,
        reserved_end_bytes=allocator.reserved_bytes,
    )


def _first_failure(
    allocator: CachingAllocator, live: LiveBlocks, placement: Placement, trace: Trace
) -> int | None:
    modes = first_modes(trace)
    emptied = _emptied_by_program(trace)
    waiting: dict[int, list[Block]] = {}
    for place, event in enumerate(trace.events):
        if event.kind in ("alloc", "oom"):
            allocator.expandable = modes.get(event.pool_id, trace.settings.expandable_segments)
            try:
                block = allocator.malloc(event.size, event.stream, event.pool_id)
            except OutOfMemory:
                return event.place
            placement.expected = None
            if event.kind == "oom":
                allocator.free(block)
            elif block is not None:
                live.add(event.address, block)
        elif event.kind in _NEW:
            modes[event.pool_id] = event.kind == "segment_map"
            placement.expect(event)
        elif place in emptied:
            allocator.empty_cache()
        else:
            _free(allocator, live, waiting, event)
    return None


def _free(
    allocator: CachingAllocator,
    live: LiveBlocks,
    waiting: dict[int, list[Block]],
    event: TraceEvent,
) -> None:
    """Follow a free, in one step or in two with another stream's work between them."""
    if event.kind == "free":
        allocator.free(live.take(event.address))
    elif event.kind == "free_requested":
        block = live.take(event.address)
        if block is not None:
            allocator.defer_free(block)
            waiting.setdefault(event.address, []).append(block)
    elif event.kind == "free_completed":
        if waiting.get(event.address):
            allocator.complete_free(waiting[event.address].pop())
        else:  # asked for before the trace began
            allocator.free(live.take(event.address))


def _emptied_by_program(trace: Trace) -> set[int]:
    """Return the places in the trace's events at which the program emptied the cache.

    A run of releases is the program's unless a new segment or an out-of-memory follows at once,
    as it does when the allocator makes room; even then if the trace holds a stack that says so,
    or if so much had been reserved at another time that memory cannot have run out.
    """
    emptied: set[int] = set()
    reserved = trace.reserved_start_bytes
    begun: int | None = None
    reserved_before = said = 0
    for place, event in enumerate(trace.events):
        if event.kind in _RELEASES:
            if begun is None:
                begun, reserved_before, said = place, reserved, False
            said = said or event.by_user
            reserved -= event.size
            continue
        if begun is not None:
            full = reserved_before + event.size > trace.reserved_peak_bytes
            pressed = event.kind == "oom" or (event.kind in _NEW and full)
            if said or not pressed:
                emptied.add(begun)
            begun = None
        if event.kind in _NEW:
            reserved += event.size
    if begun is not None:
        emptied.add(begun)
    return emptied
