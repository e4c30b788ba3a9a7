"""The section that ends a pytest run: what the tests took, the largest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.explain import signed_bytes
from bench.pytest_plugin.session import MemorySession
from bench.pytest_plugin.usage import Usage
from bench.units import format_bytes

__all__ = ["summary_lines"]


def summary_lines(session: MemorySession) -> Iterator[str]:
    """Yield the lines: for each card and evidence its tests, then what became of the baseline."""
    groups: dict[str, list[Usage]] = {}
    for usage in session.usages.values():
        groups.setdefault(usage.said, []).append(usage)
    for said, usages in groups.items():
        yield f"peak allocated, {said}:"
        yield from _rows(usages, session.most)
    new = [u for u in session.usages.values() if u.compared == "new"]
    better = [u for u in session.usages.values() if u.compared == "improvement"]
    for kind, found in (("not in the baseline", new), ("below the baseline", better)):
        if found:
            yield f"{len(found)} {kind}, as {found[0].nodeid}: record with --membench-update"
    if session.written:
        yield session.written


def _rows(usages: Sequence[Usage], most: int) -> Iterator[str]:
    ordered = sorted(usages, key=lambda u: (-u.reading.peak_allocated_bytes, u.nodeid))
    for usage in ordered[:most]:
        peak = format_bytes(usage.reading.peak_allocated_bytes).rjust(9)
        notes = "; ".join(note for note in _notes(usage) if note)
        yield f"{peak}  {usage.nodeid}{f'  ({notes})' if notes else ''}"
    if len(ordered) > most:
        yield f"{'':9}  and {len(ordered) - most} more: --membench-most {len(ordered)}"


def _notes(usage: Usage) -> Iterator[str]:
    limit = usage.limit
    if limit.size_bytes is not None:
        counted = "" if limit.counter == "allocated" else f" {limit.counter}"
        yield f"limit {format_bytes(limit.size_bytes)}{counted}"
    if usage.growth_bytes:
        yield f"{signed_bytes(usage.growth_bytes)} against the baseline"
    if usage.reading.out_of_memory:
        yield "out of memory"
    elif not usage.ended:
        yield "until it failed"
