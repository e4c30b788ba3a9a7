"""What to say where nothing fits: the nearest proposal, a card and a shape that would do."""

from __future__ import annotations

from bench.plan.largest import LargestSearch, cube_of, slices_of
from bench.plan.search import Plan, Proposal
from bench.plan.simulator import Simulator
from bench.predict.cards import Card, all_cards
from bench.shapes import Shape, format_shape
from bench.units import format_bytes

__all__ = ["remedies"]


def remedies(plan: Plan, simulator: Simulator) -> list[str]:
    """Return lines: what comes nearest and what it lacks, the smallest card, the largest shape."""
    nearest = plan.nearest
    capacity = plan.card.capacity_bytes
    missing = nearest.needs_bytes - capacity
    lines = [
        f"nothing fits {plan.card.name}, predicted: none of {len(plan.proposals)} combinations",
        (
            f"nearest: {nearest.case.variant} at {nearest.case.precision} needs "
            f"{format_bytes(nearest.needs_bytes)} of the caching allocator, there are "
            f"{format_bytes(capacity)}: {format_bytes(missing)} ({missing} bytes) are missing"
        ),
    ]
    lines.append(_card_line(nearest))
    shape = _largest_shape(nearest, simulator)
    if shape is not None:
        lines.append(f"or a smaller shape: {format_shape(shape)} fits with the same techniques")
    return lines


def _card_line(nearest: Proposal) -> str:
    cards = [card for card in all_cards().values() if card.capacity_bytes >= nearest.needs_bytes]
    if not cards:
        return "no card that membench knows has so much: take a smaller shape"
    least: Card = min(cards, key=lambda card: card.memory_bytes)
    return f"the smallest card that has so much: {least.name}, {least.model}"


def _largest_shape(nearest: Proposal, simulator: Simulator) -> Shape | None:
    """Return the largest shape that fits: with fewer slices in 3D, with equal sides in 2D."""
    case = nearest.case
    if case.imported is not None:
        return None  # what its sides may be is not known
    from memsave.networks import find_network

    divisor = tuple(find_network(case.network).divisor(case.network_options))
    if len(divisor) == 3:
        grow = slices_of((case.shape[0], case.shape[1]), divisor)
    else:
        grow = cube_of(divisor)
    return LargestSearch(case, grow, simulator).find(simulator.card).shape
