"""The largest volume that fits: a bisection over sides, in steps of what the network pools."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.case import Case
from bench.errors import MembenchError
from bench.plan.simulator import Simulator
from bench.predict.cards import Card
from bench.record import Record
from bench.shapes import MAX_SIDE, MAX_VOXELS, Shape

__all__ = ["Largest", "LargestSearch", "cube_of", "slices_of"]

_TRIED_SMALLEST = 4  # of the smallest shapes, until one is taken
Grow = Callable[[int], Shape]  # from a number of steps to a shape; more steps, no side smaller


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The largest shape that fits a card; None where not even the smallest does. Predicted."""

    card: Card
    case: Case  # at the largest shape, or at the smallest where that does not fit
    shape: Shape | None
    record: Record
    next_shape: Shape | None  # the next one, which does not fit; None where the search ended
    monotonic: bool  # whether the one after the next does not fit either
    reached_limit: bool = False  # no larger shape was tried: it would be no volume any more

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        ok = self.shape is not None
        return {
            "network": self.case.network,
            "network_options": self.case.network_options,
            "techniques": [use.name for use in self.case.techniques],
            "technique_options": {u.name: u.options for u in self.case.techniques if u.options},
            "precision": self.case.precision,
            "mode": self.case.mode,
            "batch_size": self.case.batch_size,
            "card": self.card.name,
            "fits": ok,
            "shape": list(self.shape) if self.shape is not None else None,
            "voxels": _voxels(self.shape) if self.shape is not None else 0,
            "peak_reserved_bytes": self.record.peak_reserved_bytes if ok else None,
            "process_bytes": self.record.process_bytes if ok else None,
            "needs_bytes": self.record.needs_bytes,
            "next_shape": list(self.next_shape) if self.next_shape else None,
            "monotonic": self.monotonic,
            "reached_limit": self.reached_limit,
            "evidence": "predicted",
        }


def slices_of(inplane: tuple[int, int], divisor: Shape) -> Grow:
    """Return shapes of one in-plane size, padded to the divisor, and more and more slices."""
    x, y = (-(-side // by) * by for side, by in zip(inplane, divisor[:2], strict=True))
    return lambda steps: (x, y, divisor[2] * steps)


def cube_of(divisor: Shape) -> Grow:
    """Return shapes whose sides are all equal, in steps of the largest divisor of an axis.

    Errors: MembenchError where the divisors of the axes do not divide the largest of them.
    """
    step = max(divisor)
    if any(step % by for by in divisor):
        raise MembenchError(f"no cube has sides that are multiples of {divisor}: give --inplane")
    return lambda steps: (step * steps,) * len(divisor)


class LargestSearch:
    """Finds the largest shapes of one case on cards; what was simulated serves the next card."""

    def __init__(self, case: Case, grow: Grow, simulator: Simulator) -> None:
        self._case, self._grow, self._simulator = case, grow, simulator
        self._known: dict[tuple[int, str], Record] = {}
        self._needs: dict[tuple[int, str], int] = {}

    def find(self, card: Card) -> Largest:
        """Return the largest shape that fits ``card``.

        Errors: MembenchError where the case cannot be simulated.
        """
        least = self._least(card)
        if self._record(least, card).status != "ok":
            return self._answer(card, 0, self._record(least, card))
        fits, fails = least, self._limit() + 1
        while fails - fits > 1:
            steps = self._guess(card, fits, fails)
            if self._record(steps, card).status == "ok":
                fits = steps
            else:
                fails = steps
        return self._answer(card, fits, self._record(fits, card))

    def _least(self, card: Card) -> int:
        """Return the fewest steps that the network takes at all.

        A batch norm refuses one value a channel, as the coarsest level of the smallest cube has.
        """
        for steps in range(1, _TRIED_SMALLEST):
            try:
                self._record(steps, card)
            except MembenchError:
                continue
            return steps
        return _TRIED_SMALLEST  # its error is the one to see

    def _answer(self, card: Card, fits: int, record: Record) -> Largest:
        limit = self._limit()
        beyond = 0 < fits <= limit - 2 and self._record(fits + 2, card).status == "ok"
        return Largest(
            card=card,
            case=self._at(fits or self._least(card)),
            shape=self._grow(fits) if fits else None,
            record=record,
            next_shape=self._grow(fits + 1) if 0 < fits < limit else None,
            monotonic=not beyond,
            reached_limit=fits >= limit,
        )

    def _guess(self, card: Card, fits: int, fails: int) -> int:
        """Return the next number of steps to try, strictly between the two.

        Memory grows about evenly with the volume, so a line through what is known lands near the
        answer; it is taken while it still cuts, and else the middle.
        """
        points = sorted(
            (_voxels(self._grow(steps)), needs)
            for (steps, group), needs in self._needs.items()
            if group == _group(card)
        )
        middle = (fits + fails) // 2
        if len(points) < 2:
            return min(middle, 2 * fits)
        wanted = card.capacity_bytes
        (x0, y0), (x1, y1) = sorted(sorted(points, key=lambda point: abs(point[1] - wanted))[:2])
        if y1 <= y0:
            return middle
        voxels = x0 + (wanted - y0) * (x1 - x0) / (y1 - y0)
        steps = fits
        low, high = fits, fails
        while high - low > 1:  # the most steps within so many voxels
            steps = (low + high) // 2
            low, high = (steps, high) if _voxels(self._grow(steps)) <= voxels else (low, steps)
        return max(fits + 1, min(fails - 1, low if low > fits else low + 1))

    def _limit(self) -> int:
        """Return the most steps there may be: no side or volume beyond what suites may hold."""
        low, high = 1, MAX_SIDE
        while high - low > 1:
            steps = (low + high) // 2
            shape = self._grow(steps)
            small = max(shape) <= MAX_SIDE and _voxels(shape) <= MAX_VOXELS
            low, high = (steps, high) if small else (low, steps)
        return low

    def _at(self, steps: int) -> Case:
        shape = self._grow(steps)
        return replace(self._case, shape=shape, requested_shape=shape)

    def _record(self, steps: int, card: Card) -> Record:
        key = (steps, card.name)
        if key not in self._known:
            shared = self._needs.get((steps, _group(card)))
            if shared is not None and shared > card.capacity_bytes:
                # What it needs is known from another card: this one has too little.
                other = next(r for (s, _), r in self._known.items() if s == steps)
                self._known[key] = dataclasses.replace(
                    other, status="oom", reason="needs more than the card has", process_bytes=None
                )
                return self._known[key]
            record = self._simulator.records([self._at(steps)], card)[0]
            if record.status not in ("ok", "oom"):
                raise MembenchError(f"{self._case.network} cannot be simulated: {record.reason}")
            self._known[key] = record
            self._needs[steps, _group(card)] = record.needs_bytes or 0
        return self._known[key]


def _group(card: Card) -> str:
    """Return what all cards share whose libraries take the same memory for the same step."""
    rules = dataclasses.astuple(card.convolution_workspace)[:2]
    return f"{card.cublas_workspace_bytes} {rules} {card.calibration}"


def _voxels(shape: Shape) -> int:
    voxels = 1
    for side in shape:
        voxels *= side
    return voxels
