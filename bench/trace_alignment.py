"""A predicted trace beside a recorded one: how far they agree, and the operator where they part.

Both are put in one form. Allocations count by their rounded size, frees by which allocation they
free; frees that follow each other have no order. What is allocated and freed at once, as a
library's workspace is, stands apart: such temporaries are compared between the events around them,
and one that differs does not end the agreement of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.predict.allocator import round_size
from bench.predict.step_trace import Site
from bench.predict.step_trace import Trace as PredictedTrace
from bench.predict.trace import Trace as RecordedTrace

__all__ = ["Alignment", "Parting", "align"]

_Token = tuple[str, int]  # ("alloc", rounded bytes) or ("free", number of the allocation)
_BEFORE = -1  # freed here, allocated before the trace began


@dataclass(frozen=True, slots=True)
class Parting:
    """Where the two differ. ``at_event``: the place among the recorded file's events."""

    operator: str
    module: str
    source_line: str
    predicted: str
    recorded: str
    at_event: int | None

    def __str__(self) -> str:
        place = f"{self.operator or 'the end'} in {self.module or 'the model'}"
        where = f" ({self.source_line})" if self.source_line else ""
        at = "" if self.at_event is None else f", its event {self.at_event}"
        return f"{place}{where}: predicted {self.predicted}, recorded {self.recorded}{at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """``agreeing`` of ``events`` recorded events of tensors were predicted, from the first on.

    ``parting`` is where the tensors part, ``temporary`` where the first temporaries differ before
    that; None where they do not.
    """

    events: int
    agreeing: int
    temporaries: int
    temporaries_agreeing: int
    parting: Parting | None
    temporary: Parting | None

    @property
    def first(self) -> Parting | None:
        """The first difference of either kind."""
        return self.temporary or self.parting


@dataclass(slots=True)
class _Course:
    """Events in the one form; beside each its place and the temporaries that come before it."""

    tokens: list[_Token] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    temporaries: list[list[tuple[int, int]]] = field(default_factory=list)  # (bytes, place)


def align(predicted: PredictedTrace, recorded: RecordedTrace) -> Alignment:
    """Compare a filled-in trace with a recorded one, which may begin in mid-run.

    The recorded trace is taken to begin at whichever beginning of a predicted phase agrees
    longest.
    """
    theirs = _course(_recorded_events(recorded))
    starts = _phase_starts(predicted)
    courses = [_course(_predicted_events(predicted, start)) for start in starts]
    ours = max(courses, key=lambda course: _agreement(course, theirs))
    agreeing = _agreement(ours, theirs)
    counted = _Temporaries()
    for number in range(min(agreeing + 1, len(ours.tokens), len(theirs.tokens))):
        counted.compare(ours.temporaries[number], theirs.temporaries[number], predicted, recorded)
    return Alignment(
        events=len(theirs.tokens),
        agreeing=agreeing,
        temporaries=counted.total,
        temporaries_agreeing=counted.agreeing,
        parting=_parting(ours, theirs, agreeing, predicted, recorded),
        temporary=counted.first,
    )


def _agreement(ours: _Course, theirs: _Course) -> int:
    pairs = zip(ours.tokens, theirs.tokens, strict=False)
    return next(
        (number for number, (a, b) in enumerate(pairs) if a != b),
        min(len(ours.tokens), len(theirs.tokens)),
    )


def _phase_starts(trace: PredictedTrace) -> list[int]:
    return [0, *(place for place, event in enumerate(trace.events) if event[0] == "phase")]


def _predicted_events(trace: PredictedTrace, start: int) -> Iterable[tuple[str, Any, int, int]]:
    for place in range(start, len(trace.events)):
        event = trace.events[place]
        if event[0] == "alloc" and event[2]:
            yield "alloc", event[1], event[2], place
        elif event[0] == "free":
            yield "free", event[1], 0, place


def _recorded_events(trace: RecordedTrace) -> Iterable[tuple[str, Any, int, int]]:
    for place, event in enumerate(trace.events):
        if event.kind == "alloc" and event.size:
            yield "alloc", event.address, round_size(event.size, trace.settings), place
        elif event.kind in ("free", "free_requested"):
            yield "free", event.address, 0, place


def _course(events: Iterable[tuple[str, Any, int, int]]) -> _Course:
    """Put events (kind, identity, bytes, place) into the one form."""
    course, waiting = _Course(), list(events)
    numbers: dict[Any, int] = {}
    made = 0
    frees: list[tuple[int, int]] = []
    between: list[tuple[int, int]] = []

    def release() -> None:
        for number, place in sorted(frees):
            _append(course, ("free", number), place, between)
        frees.clear()

    skipped: set[int] = set()
    for index, (kind, identity, size, place) in enumerate(waiting):
        if index in skipped:
            continue
        if kind == "free":
            frees.append((numbers.pop(identity, _BEFORE), place))
            continue
        release()
        own = _own_free(waiting, index)
        if own is not None:
            between.append((-(-size // 512) * 512, place))
            skipped.add(own)
        else:
            _append(course, ("alloc", -(-size // 512) * 512), place, between)
            numbers[identity] = made
            made += 1
    release()
    return course


def _own_free(events: Sequence[tuple[str, Any, int, int]], index: int) -> int | None:
    """Return the place of an allocation's own free, if it is among the frees right after it."""
    for following in range(index + 1, len(events)):
        kind, identity, *_ = events[following]
        if kind != "free":
            return None
        if identity == events[index][1]:
            return following
    return None


def _append(course: _Course, token: _Token, place: int, between: list[tuple[int, int]]) -> None:
    course.tokens.append(token)
    course.places.append(place)
    course.temporaries.append(list(between))
    between.clear()


@dataclass(slots=True)
class _Temporaries:
    total: int = 0
    agreeing: int = 0
    first: Parting | None = None

    def compare(
        self,
        ours: Sequence[tuple[int, int]],
        theirs: Sequence[tuple[int, int]],
        predicted: PredictedTrace,
        recorded: RecordedTrace,
    ) -> None:
        """Compare the temporaries between two events, in order."""
        self.total += len(theirs)
        for number in range(max(len(ours), len(theirs))):
            mine = ours[number] if number < len(ours) else None
            other = theirs[number] if number < len(theirs) else None
            if mine is not None and other is not None and mine[0] == other[0]:
                self.agreeing += 1
            elif self.first is None:
                site = _site_at(predicted, mine[1]) if mine else Site("", "", "")
                self.first = Parting(
                    site.operator,
                    site.module,
                    site.source_line,
                    f"a temporary of {mine[0]} bytes" if mine else "no temporary",
                    f"one of {other[0]} bytes" if other else "none",
                    recorded.events[other[1]].place if other else None,
                )


def _parting(
    ours: _Course,
    theirs: _Course,
    at: int,
    predicted: PredictedTrace,
    recorded: RecordedTrace,
) -> Parting | None:
    if at == len(theirs.tokens):  # a record that ends early is no difference
        return None
    ended = at >= len(ours.tokens)
    site = Site("", "", "") if ended else _site_at(predicted, ours.places[at])
    return Parting(
        site.operator,
        site.module,
        site.source_line,
        "nothing more" if ended else _text(ours.tokens[at]),
        _text(theirs.tokens[at]),
        recorded.events[theirs.places[at]].place,
    )


def _site_at(trace: PredictedTrace, place: int) -> Site:
    return trace.sites[trace.events[place][1]]


def _text(token: _Token) -> str:
    kind, value = token
    if kind == "alloc":
        return f"an allocation of {value} bytes"
    return "a free of what came before" if value == _BEFORE else f"a free of allocation {value}"
