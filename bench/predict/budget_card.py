"""A budget of bytes as a card: what a process may take where no card is named."""

from __future__ import annotations

import re
from dataclasses import replace

from bench.predict.card import Card
from bench.predict.card_files import all_cards
from bench.units import format_bytes

__all__ = ["budget_card", "named_budget"]

_MODEL = "a100-80gb"  # whose context and workspaces a budget is taken with
_GIB = 2**30
_NAME = re.compile(r"budget-(?:([1-9][0-9]{0,17})b-)?([1-9][0-9]{0,8})gb")


def budget_card(budget_bytes: int) -> Card:
    """Return a card of so many bytes for the whole process, its context included.

    The context and the workspaces are those of an A100 80 GB, since a budget names no card. A
    budget that its context alone exceeds leaves the allocator one byte: nothing fits. The name says
    the bytes, so that ``find_card`` makes the same card of it again: ``budget-20gb`` for 20 GiB,
    ``budget-1500000000b-2gb`` for what is no whole number of them.
    """
    model = all_cards()[_MODEL]
    gib, rest = -(-budget_bytes // _GIB), budget_bytes % _GIB
    return replace(
        model,
        name=f"budget-{budget_bytes}b-{max(1, gib)}gb" if rest else f"budget-{gib}gb",
        memory_bytes=max(budget_bytes, model.context_bytes + 1),
        memory_source=f"a budget of {format_bytes(budget_bytes)}",
        calibration=None,
    )


def named_budget(name: str) -> Card | None:
    """Return the card of a budget that is called so, None where the name is no budget's."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    card = budget_card(int(match[1] or 0) or int(match[2]) * _GIB)
    return card if card.name == name else None
