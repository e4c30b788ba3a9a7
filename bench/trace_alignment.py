"""A predicted trace beside a recorded one: how far they agree, and the operator where they part.

Both are put in one form. Allocations count by their rounded size, frees by which allocation they
free; frees that follow each other have no order. What is allocated and freed at once, as a
library's workspace is, stands apart: such temporaries are compared between the events around them,
and one that differs does not end the agreement of the tensors. A predicted one of no bytes, such as
the workspace of a card that is said to need none, is none; yet it tells who may have taken one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from bench.predict.allocator import round_size
from bench.predict.step_trace import Site
from bench.predict.step_trace import Trace as PredictedTrace
from bench.predict.trace import Trace as RecordedTrace

__all__ = ["Alignment", "Parting", "align"]

_Token = tuple[str, int]  # ("alloc", rounded bytes) or ("free", number of the allocation)
_Temporary = tuple[int, int]  # its rounded bytes and its place among the events
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
    temporaries: list[list[_Temporary]] = field(default_factory=list)


def align(predicted: PredictedTrace, recorded: RecordedTrace) -> Alignment:
    """Compare a filled-in trace with a recorded one, which may begin in mid-run.

    One that begins with nothing on the GPU begins as the prediction does; any other is taken to
    begin at whichever beginning of a predicted phase agrees longest.
    """
    theirs = _course(_recorded_events(recorded))
    goes_on = bool(recorded.segments) or ("free", _BEFORE) in theirs.tokens
    starts = _phase_starts(predicted) if goes_on else [0]
    courses = [_course(_predicted_events(predicted, start, recorded)) for start in starts]
    ours = max(courses, key=lambda course: _agreement(course, theirs))
    agreeing = _agreement(ours, theirs)
    counted = _Temporaries()
    for number in range(min(agreeing + 1, len(ours.tokens), len(theirs.tokens))):
        counted.compare(
            ours.temporaries[number],
            theirs.temporaries[number],
            (predicted, ours.places[number]),
            recorded,
        )
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


def _predicted_events(
    trace: PredictedTrace, start: int, recorded: RecordedTrace
) -> Iterable[tuple[str, Any, int, int]]:
    for place in range(start, len(trace.events)):
        event = trace.events[place]
        if event[0] == "alloc":
            size = round_size(event[2], recorded.settings) if event[2] else 0
            yield "alloc", event[1], size, place
        elif event[0] == "free":
            yield "free", event[1], 0, place


def _recorded_events(trace: RecordedTrace) -> Iterable[tuple[str, Any, int, int]]:
    for place, event in enumerate(trace.events):
        if event.kind == "alloc" and event.size:
            yield "alloc", event.address, round_size(event.size, trace.settings), place
        elif event.kind in ("free", "free_requested"):
            yield "free", event.address, 0, place


def _course(events: Iterable[tuple[str, Any, int, int]]) -> _Course:
    """Put events (kind, identity, rounded bytes, place) into the one form."""
    course = _Course()
    waiting, empty = _without_empty(events)
    numbers: dict[Any, int] = {}
    made = 0
    frees: list[tuple[int, int]] = []
    between: list[_Temporary] = []

    def release(until: int) -> None:
        for number, place in sorted(frees):
            _append(course, ("free", number), place, between)
        frees.clear()
        while empty and empty[0][1] < until:
            between.append(empty.pop(0))

    skipped: set[int] = set()
    for index, (kind, identity, size, place) in enumerate(waiting):
        if index in skipped:
            continue
        if kind == "free":
            frees.append((numbers.pop(identity, _BEFORE), place))
            continue
        release(place)
        own = _own_free(waiting, index)
        if own is not None:
            between.append((size, place))
            skipped.add(own)
        else:
            _append(course, ("alloc", size), place, between)
            numbers[identity] = made
            made += 1
    release(0)
    return course


def _without_empty(
    events: Iterable[tuple[str, Any, int, int]],
) -> tuple[list[tuple[str, Any, int, int]], list[_Temporary]]:
    """Take allocations of no bytes, and their frees, out of the events."""
    left: list[tuple[str, Any, int, int]] = []
    empty: dict[Any, _Temporary] = {}
    for kind, identity, size, place in events:
        if kind == "alloc" and not size:
            empty[identity] = (0, place)
        elif kind == "alloc" or identity not in empty:
            left.append((kind, identity, size, place))
    return left, list(empty.values())


def _own_free(events: Sequence[tuple[str, Any, int, int]], index: int) -> int | None:
    """Return the place of an allocation's own free, if it is among the frees right after it."""
    for following in range(index + 1, len(events)):
        kind, identity, *_ = events[following]
        if kind != "free":
            return None
        if identity == events[index][1]:
            return following
    return None


def _append(course: _Course, token: _Token, place: int, between: list[_Temporary]) -> None:
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
        ours: Sequence[_Temporary],
        theirs: Sequence[_Temporary],
        before: tuple[PredictedTrace, int],
        recorded: RecordedTrace,
    ) -> None:
        """Compare the temporaries between two events, in order.

        ``before``: the predicted trace and the place of the event that comes after them.
        """
        self.total += len(theirs)
        taken = [one for one in ours if one[0]]
        pairs = list(zip_longest(taken, theirs))
        self.agreeing += sum(_alike(mine, other) for mine, other in pairs)
        if self.first is None and not all(_alike(mine, other) for mine, other in pairs):
            if len(ours) == len(theirs):  # those of no bytes are the recorded ones' places
                pairs = list(zip_longest(ours, theirs))
            mine, other = next((m, o) for m, o in pairs if not _alike(m, o))
            self.first = _differing(mine, other, before, recorded)


def _alike(mine: _Temporary | None, other: _Temporary | None) -> bool:
    return mine is not None and other is not None and mine[0] == other[0]


def _differing(
    mine: _Temporary | None,
    other: _Temporary | None,
    before: tuple[PredictedTrace, int],
    recorded: RecordedTrace,
) -> Parting:
    predicted, place = before
    site = _site_at(predicted, place if mine is None else mine[1])
    return Parting(
        site.operator,
        site.module,
        site.source_line,
        "no temporary" if mine is None or not mine[0] else f"a temporary of {mine[0]} bytes",
        "none" if other is None else f"one of {other[0]} bytes",
        None if other is None else recorded.events[other[1]].place,
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
