"""A trace as a sequence of tokens that does not count: equal steps have equal tokens.

Ids count up as a step runs, so two equal steps of a loop have different events. A token says the
same without ids: an allocation by its site, category and stream; a free by what it frees, namely
which of the allocations of one site and category that are alive, counted from the newest, from the
oldest or from where the last one was freed, whichever is nearest. Bytes stand beside the tokens,
as they may follow the number of steps. ``decode`` gives the very trace back, ids and all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from bench.predict.step_trace import Event, Trace

__all__ = ["NO_BYTES", "Token", "TokenTable", "Tokens"]

Token = tuple[Any, ...]
"""``("alloc", group, stream)``; ``("free", group, "newest" | "oldest" | "last", distance)``;
``("convolution", kind, site)``; any other event as it stands. A group is ``(site, category)``."""

NO_BYTES = -1  # beside a token that has no bytes


@dataclass(frozen=True, slots=True)
class Tokens:
    """A trace's tokens by number, and the bytes of each event."""

    numbers: list[int]
    bytes: list[int]


@dataclass(slots=True)
class _Alive:
    """The ids of one group that are alive, oldest first, and where the last one was taken out."""

    identities: list[int] = field(default_factory=list)
    last: int = 0

    def take(self, identity: int) -> tuple[str, int]:
        """Take ``identity`` out; return where it was."""
        index = bisect_left(self.identities, identity)
        if self.identities[index : index + 1] != [identity]:
            raise LookupError(f"{identity} is freed but not alive")
        newest, last = len(self.identities) - 1 - index, index - self.last
        self._remove(index)
        if newest <= min(index, abs(last)):
            return "newest", newest
        return ("oldest", index) if index <= abs(last) else ("last", last)

    def take_at(self, end: str, distance: int) -> int:
        """Take out and return what ``take`` found there."""
        if end == "last":
            index = self.last + distance
        else:
            index = distance if end == "oldest" else len(self.identities) - 1 - distance
        if not 0 <= index < len(self.identities):
            raise LookupError(f"of {len(self.identities)} alive none is number {index}")
        return self._remove(index)

    def _remove(self, index: int) -> int:
        self.last = index
        return self.identities.pop(index)


@dataclass(slots=True)
class TokenTable:
    """Numbers tokens, alike for all traces that it encodes."""

    tokens: list[Token] = field(default_factory=list)
    _numbers: dict[Token, int] = field(default_factory=dict)

    def encode(self, trace: Trace) -> Tokens:
        """Return the tokens of ``trace``. Ids must count up in the order of allocation."""
        encoded = Tokens([], [])
        live: defaultdict[Any, _Alive] = defaultdict(_Alive)
        for event in trace.events:
            token, size = _token(event, trace, live)
            number = self._numbers.setdefault(token, len(self.tokens))
            if number == len(self.tokens):
                self.tokens.append(token)
            encoded.numbers.append(number)
            encoded.bytes.append(size)
        return encoded

    def decode(self, encoded: Tokens) -> Trace:
        """Return the trace whose tokens these are, without its FLOPs.

        Raises LookupError for a free of what is not alive: no trace has these tokens.
        """
        trace = Trace()
        events, sites, categories = trace.events, trace.sites, trace.categories
        live: defaultdict[Any, _Alive] = defaultdict(_Alive)
        for number, size in zip(encoded.numbers, encoded.bytes, strict=True):
            token = self.tokens[number]
            kind = token[0]
            if kind == "alloc":
                site, category = group = token[1]
                live[group].identities.append(len(sites))
                events.append(("alloc", len(sites), size, token[2]))
                sites.append(site)
                categories.append(category)
            elif kind == "free":
                _, group, end, distance = token
                events.append(("free", live[group].take_at(end, distance)))
            elif kind == "convolution":
                events.append(("convolution", size, *token[1:]))
            else:
                events.append(token)
        return trace


def _token(event: Event, trace: Trace, live: defaultdict[Any, _Alive]) -> tuple[Token, int]:
    """Return an event's token and bytes; ``live`` holds what is alive, by group."""
    kind = event[0]
    if kind == "alloc":
        _, identity, size, stream = event
        group = (trace.sites[identity], trace.categories[identity])
        live[group].identities.append(identity)
        return ("alloc", group, stream), size
    if kind == "free":
        identity = event[1]
        group = (trace.sites[identity], trace.categories[identity])
        return ("free", group, *live[group].take(identity)), NO_BYTES
    if kind == "convolution":
        return ("convolution", *event[2:]), event[1]
    return event, NO_BYTES
