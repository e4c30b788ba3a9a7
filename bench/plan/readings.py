"""What one case needs at any shape, on any card: each simulated once, and shared where it may be.

Two cards whose libraries take the same workspaces see the same calls of the allocator. What needs
more than the smaller one has does not fit there; and a run that never reserved more than the
smaller one has would have gone the same way on it. Only what lies between is simulated again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace

from bench.case import Case
from bench.environment import allocator_settings
from bench.errors import MembenchError
from bench.imported import InputSpec, parse_input
from bench.plan.simulator import Simulator
from bench.predict.cards import Card
from bench.record import Record
from bench.shapes import Shape, format_shape

__all__ = ["NotSimulatedError", "Readings", "at_shape"]


class NotSimulatedError(MembenchError):
    """The network cannot be simulated at a shape: its reason, with the shape at hand."""

    def __init__(self, network: str, shape: Shape, reason: str) -> None:
        super().__init__(f"{network} cannot be simulated at {format_shape(shape)}: {reason}")
        self.shape = shape


def at_shape(case: Case, shape: Shape, requested: Shape | None = None) -> Case:
    """Return ``case`` at another shape; of a network of the user's own, its image is changed too.

    ``requested``: what was asked for before it was padded, if that is not ``shape``.
    """
    imported = case.imported
    if imported is not None and imported.inputs:
        first = parse_input(imported.inputs[0])
        image = InputSpec((*first.shape[:2], *shape), first.dtype)
        imported = replace(imported, inputs=(str(image), *imported.inputs[1:]))
    return replace(case, shape=shape, requested_shape=requested or shape, imported=imported)


class Readings:
    """Records of one case, by shape and card."""

    def __init__(self, case: Case, simulator: Simulator) -> None:
        self.case = case
        self._simulator = simulator
        self._known: dict[tuple[Shape, str], Record] = {}
        self._of_group: dict[tuple[Shape, str], list[tuple[Card, Record]]] = {}
        self._failed: dict[Shape, str] = {}
        self._learnt: dict[tuple[Shape, str], int] = {}
        # Settings of the user's may make the allocator look at the capacity before it is full.
        self._may_share_fits = not allocator_settings()

    def at(self, shape: Shape, card: Card) -> Record:
        """Return the record of one shape.

        Errors: NotSimulatedError where it cannot be simulated.
        """
        return self.many([shape], card)[0]

    def many(self, shapes: Sequence[Shape], card: Card) -> list[Record]:
        """Return the records of ``shapes``, those not known yet simulated at the same time.

        Errors: NotSimulatedError for the first that cannot be simulated; the others are kept.
        """
        self._refuse_failed(shapes)
        missing = [s for s in dict.fromkeys(shapes) if not self._knows(s, card)]
        cases = [at_shape(self.case, shape) for shape in missing]
        records = self._simulator.records(cases, card) if cases else []
        for shape, record in zip(missing, records, strict=True):
            if record.status in ("ok", "oom"):
                self._known[shape, card.name] = record
                self._of_group.setdefault((shape, _group(card)), []).append((card, record))
            else:
                self._failed[shape] = record.reason
        self._refuse_failed(missing)
        return [self._known[shape, card.name] for shape in shapes]

    def needs(self, card: Card) -> list[tuple[int, int]]:
        """Return what is known for cards like ``card``: (voxels, bytes needed), by voxels."""
        group = _group(card)
        needs = {key: known[0][1].needs_bytes or 0 for key, known in self._of_group.items()}
        return sorted(
            (math.prod(shape), needed)
            for (shape, of), needed in {**self._learnt, **needs}.items()
            if of == group
        )

    def learn(self, shape: Shape, card: Card, needs_bytes: int) -> None:
        """Take in what is known from elsewhere, to guess by: no record of it is kept."""
        self._learnt[shape, _group(card)] = needs_bytes

    def _refuse_failed(self, shapes: Sequence[Shape]) -> None:
        for shape in shapes:
            if shape in self._failed:
                raise NotSimulatedError(self.case.network, shape, self._failed[shape])

    def _knows(self, shape: Shape, card: Card) -> bool:
        if (shape, card.name) in self._known:
            return True
        for other, record in self._of_group.get((shape, _group(card)), ()):
            derived = self._derived(record, other, card)
            if derived is not None:
                self._known[shape, card.name] = derived
                return True
        return False

    def _derived(self, record: Record, other: Card, card: Card) -> Record | None:
        """Return the record of ``card`` that follows from another card's, None where none does."""
        if (record.needs_bytes or 0) > card.capacity_bytes:
            return replace(
                record, status="oom", reason="needs more than the card has", process_bytes=None
            )
        reserved = record.peak_reserved_bytes or 0
        smaller = card.capacity_bytes <= other.capacity_bytes
        if record.status != "ok" or not smaller or reserved > card.capacity_bytes:
            return None
        if not self._may_share_fits:
            return None
        return replace(record, process_bytes=reserved + card.context_bytes)


def _group(card: Card) -> str:
    """Return what all cards share whose libraries take the same memory for the same step."""
    rules = dataclasses.astuple(card.convolution_workspace)[:2]
    return f"{card.cublas_workspace_bytes} {rules} {card.calibration}"
