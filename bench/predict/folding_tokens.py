"""A trace as a sequence of tokens that does not count: equal steps have equal tokens.

Ids count up as a step runs, so two equal steps of a loop have different events. A token says the
same without ids: an allocation by its site, category and stream; a free by what it frees, namely
which of the allocations of one site and category that are alive, counted from the newest or from
the oldest, whichever is nearer. Bytes stand beside the tokens, as they may follow the number of
steps. ``decode`` gives the very trace back, ids and all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.predict.tracer import Event, Trace
from bench.record import Category

__all__ = ["NO_BYTES", "Token", "TokenTable", "Tokens"]

Token = tuple[Any, ...]
"""``("alloc", group, stream)``, ``("free", group, "newest" | "oldest", rank)``, a group being a
``(site, category)``; ``("convolution", kind, site)``; any other event as it stands."""

NO_BYTES = -1  # beside a token that has no bytes


@dataclass(frozen=True, slots=True)
class Tokens:
    """A trace's tokens by number, and the bytes of each event."""

    numbers: list[int]
    bytes: list[int]


@dataclass(slots=True)
class TokenTable:
    """Numbers tokens, alike for all traces that it encodes."""

    tokens: list[Token] = field(default_factory=list)
    _numbers: dict[Token, int] = field(default_factory=dict)

    def encode(self, trace: Trace) -> Tokens:
        """Return the tokens of ``trace``. Ids must count up in the order of allocation."""
        encoded = Tokens([], [])
        live: dict[tuple[Any, Category], list[int]] = {}
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
        live: dict[tuple[Any, Category], list[int]] = {}
        for number, size in zip(encoded.numbers, encoded.bytes, strict=True):
            token = self.tokens[number]
            kind = token[0]
            if kind == "alloc":
                site, category = group = token[1]
                live.setdefault(group, []).append(len(sites))
                events.append(("alloc", len(sites), size, token[2]))
                sites.append(site)
                categories.append(category)
            elif kind == "free":
                _, group, end, rank = token
                events.append(("free", live[group].pop(-1 - rank if end == "newest" else rank)))
            elif kind == "convolution":
                events.append(("convolution", size, *token[1:]))
            else:
                events.append(token)
        return trace


def _token(
    event: Event, trace: Trace, live: dict[tuple[Any, Category], list[int]]
) -> tuple[Token, int]:
    """Return an event's token and bytes; ``live`` holds the ids alive by group, oldest first."""
    kind = event[0]
    if kind == "alloc":
        _, identity, size, stream = event
        group = (trace.sites[identity], trace.categories[identity])
        live.setdefault(group, []).append(identity)
        return ("alloc", group, stream), size
    if kind == "free":
        identity = event[1]
        group = (trace.sites[identity], trace.categories[identity])
        end, rank = _take(live[group], identity)
        return ("free", group, end, rank), NO_BYTES
    if kind == "convolution":
        return ("convolution", *event[2:]), event[1]
    return event, NO_BYTES


def _take(identities: list[int], identity: int) -> tuple[str, int]:
    """Take ``identity`` out of the list; return where it was, from the nearer end."""
    last = len(identities) - 1
    for rank in range(len(identities)):
        if identities[last - rank] == identity:
            del identities[last - rank]
            return "newest", rank
        if identities[rank] == identity:
            del identities[rank]
            return "oldest", rank
    raise LookupError(f"{identity} is freed but not alive")
