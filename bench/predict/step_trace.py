"""What tracing a step gives: its events in order, and where each allocation came from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from bench.flops import Flops
from bench.record import Category

__all__ = ["Event", "Site", "Trace", "releases_in_order"]

Event = tuple[Any, ...]
"""``("alloc", id, bytes, stream)``, ``("free", id)``, ``("phase", name)``,
``("convolution", operand_bytes, "float32" | "half", call, site)``, ``("cublas", stream, site)`` or
``("operator", call, site)``; ``bench.predict.library_calls`` has the calls. ``("host", bytes)``:
host memory taken, or given back where negative, which the allocator knows nothing of."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where an allocation came from."""

    module: str
    operator: str
    source_line: str


@dataclass(slots=True)
class Trace:
    """The events of a step, and for each allocation id its site and category."""

    events: list[Event] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)  # by allocation id
    categories: list[Category] = field(default_factory=list)  # by allocation id
    flops: Flops = field(default_factory=Flops)  # of one step
    notes: tuple[str, ...] = ()  # how the network was built
    estimated: set[str] = field(default_factory=set)  # what else rests on an estimate


def releases_in_order(events: list[Event]) -> list[Event]:
    """Return the events with frees that follow each other in the order of their ids.

    What is released at one moment may come in any order: autocast's copies of the weights lie in
    a table by address. Without an order of our own two traces of one step would differ by it. To
    the allocator it is all the same: free neighbours end up as one block either way.
    """
    ordered: list[Event] = []
    for is_free, group in itertools.groupby(events, key=lambda event: event[0] == "free"):
        ordered += sorted(group) if is_free else group  # noqa: B031  # one of the two
    return ordered
