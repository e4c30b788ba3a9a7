"""The timeline of a simulated run: which of its events are kept, so that few show it as it was."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from bench.predict.step_trace import Event, Trace
from bench.timeline import Timeline, differences

__all__ = ["History", "make_timeline"]

History = list[tuple[int, int]]
"""(allocated, reserved) bytes once each event has run, as ``simulate`` fills it."""

_Array = npt.NDArray[np.int64]
_BUCKETS = 40  # each gives its highest and its lowest point; some 80 points fill 5 KiB of JSON


def make_timeline(trace: Trace, history: History, oom_event: int | None) -> Timeline | None:
    """Return the timeline of ``trace``; None where nothing is allocated.

    The run is cut into stretches of about equal length that end where phases do. Of each the
    highest and the lowest point are kept, and the ends of each phase: so every phase's peak is
    exact, and so is the run's, of requested and of allocated bytes.
    """
    events = trace.events
    if not trace.categories:
        return None
    held = _held_by_category(trace)
    requested: _Array = np.sum(list(held.values()), axis=0, dtype=np.int64)
    ended = oom_event is not None
    allocated, reserved = np.array([] if ended else history, np.int64).reshape(-1, 2).T
    phases = [(str(event[1]), at) for at, event in enumerate(events) if event[0] == "phase"]
    heights = [requested] if ended else [allocated, requested]
    points = _points(heights, [at for _, at in phases], len(events))
    return Timeline(
        events=tuple(points.tolist()),
        phases=tuple(phases),
        changes_bytes={
            name: differences(column[points].tolist())
            for name, column in held.items()
            if column.any()
        },
        rounding_changes_bytes=() if ended else _changes((allocated - requested)[points]),
        reserved_changes_bytes=() if ended else _changes(reserved[points]),
        oom_event=oom_event,
    )


def _changes(column: _Array) -> tuple[int, ...]:
    return differences(column.tolist())


def _held_by_category(trace: Trace) -> dict[str, _Array]:
    """Return category -> requested bytes held once each event has run."""
    names = list(dict.fromkeys(trace.categories))
    numbers = {name: number for number, name in enumerate(names)}
    of_event = np.full(len(trace.events), -1, np.int64)
    change = np.zeros(len(trace.events), np.int64)
    sizes: dict[int, int] = {}
    for at, event in enumerate(trace.events):
        sign = _record(event, sizes)
        if sign:
            of_event[at] = numbers[trace.categories[event[1]]]
            change[at] = sign
    return {
        name: np.cumsum(np.where(of_event == number, change, 0)) for name, number in numbers.items()
    }


def _record(event: Event, sizes: dict[int, int]) -> int:
    """Return by how many bytes an event changes what is held."""
    if event[0] == "alloc":
        sizes[event[1]] = event[2]
        return int(event[2])
    return -sizes.pop(event[1], 0) if event[0] == "free" else 0


def _points(heights: Sequence[_Array], phases: Sequence[int], count: int) -> _Array:
    """Return the numbers of the events that are kept, ascending."""
    kept = {0, count - 1}
    edges = sorted({0, *phases, count})
    for begin, end in pairwise(edges):
        kept |= {begin, end - 1, *(begin + int(h[begin:end].argmax()) for h in heights)}
        stretches = max(1, round(_BUCKETS * (end - begin) / count))
        bounds = np.linspace(begin, end, stretches + 1).astype(int)
        for first, last in pairwise(bounds):
            if last > first:
                stretch = heights[0][first:last]
                kept |= {first + int(stretch.argmax()), first + int(stretch.argmin())}
    return np.array(sorted(kept), np.int64)
