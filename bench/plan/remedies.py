"""What to say where nothing fits: the nearest proposal, a card and a shape that would do."""

from __future__ import annotations

import math

from bench.case import Case
from bench.errors import MembenchError
from bench.plan.largest import Grow, LargestSearch, cube_of, slices_of
from bench.plan.patches import in_proportion
from bench.plan.search import Plan, Proposal
from bench.plan.simulator import Simulator
from bench.predict.budget_card import named_budget
from bench.predict.cards import Card, all_cards
from bench.shapes import format_shape
from bench.units import format_bytes

__all__ = ["nearest_lines", "remedies", "smaller_shapes"]

_MOST_POOLED = 32  # five poolings by two


def remedies(plan: Plan, simulator: Simulator) -> list[str]:
    """Return lines: what comes nearest and what it lacks, the smallest card, the largest shape."""
    return [*nearest_lines(plan), *_shape_line(plan.nearest.case, simulator)]


def nearest_lines(plan: Plan) -> list[str]:
    """Return lines: what comes nearest and what it lacks, and the smallest card that has it."""
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
    if named_budget(plan.card.name) is not None:
        lines.append(_budget_line(plan, nearest))
    return [*lines, _card_line(nearest)]


def _budget_line(plan: Plan, nearest: Proposal) -> str:
    """Return the least budget that would do; where the context alone takes all, that too."""
    context = plan.card.context_bytes
    least = nearest.needs_bytes + context
    return (
        f"the least budget that would do: {least} bytes ({format_bytes(least)}), of which the CUDA "
        f"context takes {format_bytes(context)}"
    )


def _card_line(nearest: Proposal) -> str:
    cards = [card for card in all_cards().values() if card.capacity_bytes >= nearest.needs_bytes]
    if not cards:
        return "no card that membench knows has so much: take a smaller shape"
    least: Card = min(cards, key=lambda card: card.memory_bytes)
    return f"the smallest card that has so much: {least.name}, {least.model}"


def _shape_line(case: Case, simulator: Simulator) -> list[str]:
    """Return a line with the largest shape that fits, none where there is none."""
    grow = smaller_shapes(case)
    if grow is None:
        return []
    try:
        shape = LargestSearch(case, grow, simulator).find(simulator.card).shape
    except MembenchError as error:
        return [f"no smaller shape is named: {error}"]
    if shape is None:
        return []
    return [f"or a smaller shape: {format_shape(shape)} fits with the same techniques"]


def smaller_shapes(case: Case) -> Grow | None:
    """Return which shapes to try: with fewer slices in 3D, with equal sides in 2D.

    Of a network of the user's own those of the same proportions, since nobody knows what its sides
    may be: in steps of the power of two, up to 32, that divides all sides of the shape asked for,
    and so at least what the network pools where that is a power of two. None where it takes several
    inputs, whose shapes may hang together, or no image.
    """
    if case.imported is not None:
        if len(case.imported.inputs) > 1 or not case.shape:
            return None
        common = math.gcd(*case.shape, _MOST_POOLED)
        return in_proportion(case.shape, (common,) * len(case.shape))
    from memsave.networks import find_network

    divisor = tuple(find_network(case.network).divisor(case.network_options))
    if len(divisor) == 3:
        return slices_of((case.shape[0], case.shape[1]), divisor)
    return cube_of(divisor)
