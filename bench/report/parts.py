"""What a row's GPU memory is made of, as far as its record knows: by category, or by part.

A record that names the holders of its peak gives categories: parameters, gradients, activations
and so on. One that does not, as a measured one, gives tensors as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from bench.record import Category, Record
from bench.report.rows import Row

__all__ = ["bar_parts", "category_part", "held_by_category"]

_KNOWN = frozenset(get_args(Category))


def category_part(category: str) -> str:
    """Return the part that a category is drawn as: itself, ``other`` for one of a later version."""
    return category if category in _KNOWN else "other"


def bar_parts(row: Row) -> list[tuple[str, int]]:
    """Return what a row's bar is stacked of, (part, bytes) from the axis on; they add up to it.

    Where the parts are not all known the figure is one bar but for the context; nothing where
    there is no figure. A case that does not fit is stacked of what it would hold at its peak on a
    larger card, where its record has a timeline, and of what the allocator needs beside it.
    """
    if row.figure_bytes is None:
        return []
    record = row.record
    context = record.parts.context_bytes or 0
    held = held_by_category(record)
    left = row.figure_bytes - context - sum(held.values())
    if held and left >= 0:
        stacked = [*held.items(), ("allocator", left), ("context", context)]
    elif record.status == "oom":
        stacked = [("needs", row.figure_bytes - context), ("context", context)]
    else:
        stacked = _plain(record, row.figure_bytes, context)
    return [(name, size) for name, size in stacked if size > 0]


def held_by_category(record: Record) -> dict[str, int]:
    """Return part -> requested bytes at the peak; empty where the record does not know.

    Of a case that does not fit: at the peak of the whole step, which it did not reach.
    """
    if record.status == "oom":
        timeline = record.timeline
        if timeline is None:
            return {}
        peak = timeline.peak()
        return _added({name: column[peak] for name, column in timeline.held_bytes().items()})
    held: dict[str, int] = {}
    for holder in record.peak_holders:
        held[holder.category] = held.get(holder.category, 0) + holder.bytes
    return _added(held)


def _added(by_category: Mapping[str, int]) -> dict[str, int]:
    """Add up categories by part, in the order in which parts are stacked."""
    from bench.report.style import PART_COLOURS

    totals = dict.fromkeys(PART_COLOURS, 0)
    for name, size in by_category.items():
        totals[category_part(name)] += size
    return {name: size for name, size in totals.items() if size}


def _plain(record: Record, figure_bytes: int, context: int) -> list[tuple[str, int]]:
    parts = record.parts
    if parts.tensors_bytes is None or parts.allocator_bytes is None:
        return [("tensors", figure_bytes - context), ("context", context)]
    return [
        ("tensors", parts.tensors_bytes),
        ("workspace", parts.workspace_bytes or 0),
        ("allocator", parts.allocator_bytes),
        ("context", context),
    ]
