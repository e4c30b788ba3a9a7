"""The largest volume that fits: a bisection over sides, in steps of what the network pools."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.case import Case
from bench.errors import MembenchError
from bench.plan.readings import NotSimulatedError, Readings, at_shape
from bench.plan.simulator import Simulator
from bench.predict.cards import Card
from bench.record import Record
from bench.shapes import MAX_SIDE, MAX_VOXELS, Shape

__all__ = ["Largest", "LargestSearch", "affordable_voxels", "cube_of", "slices_of"]

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
            "voxels": math.prod(self.shape) if self.shape is not None else 0,
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
    """Finds the largest shapes of one case on cards; what was simulated serves the next card.

    ``limit``: the most steps there are to take, where not the limits of shapes end them.
    ``readings``: what is known of the case already.
    """

    def __init__(
        self,
        case: Case,
        grow: Grow,
        simulator: Simulator,
        *,
        limit: int | None = None,
        readings: Readings | None = None,
    ) -> None:
        self._grow = grow
        self._readings = readings or Readings(case, simulator)
        self._limit = limit or _most_steps(grow)
        self._limited = limit is not None

    def find(self, card: Card) -> Largest:
        """Return the largest shape that fits ``card``.

        Errors: MembenchError where the case cannot be simulated.
        """
        least = self._least(card)
        if self._record(least, card).status != "ok":
            return self._answer(card, 0, least)
        fits, fails = least, self._limit + 1
        while fails - fits > 1:
            steps = self._guess(card, fits, fails)
            if self._record(steps, card).status == "ok":
                fits = steps
            else:
                fails = steps
        return self._answer(card, fits, fits)

    def _least(self, card: Card) -> int:
        """Return the fewest steps that the network takes at all.

        A batch norm refuses one value a channel, as the coarsest level of the smallest cube has.
        """
        tried = list(range(1, min(_TRIED_SMALLEST, self._limit) + 1))
        while self._limited and 2 * tried[-1] <= self._limit:  # a patch may be far too small
            tried.append(2 * tried[-1])
        for steps in tried[:-1]:
            try:
                self._record(steps, card)
            except NotSimulatedError:
                continue
            return steps
        return tried[-1]  # its error is the one to see

    def _answer(self, card: Card, fits: int, shown: int) -> Largest:
        limit = self._limit
        beyond = 0 < fits <= limit - 2 and self._record(fits + 2, card).status == "ok"
        return Largest(
            card=card,
            case=at_shape(self._readings.case, self._grow(shown)),
            shape=self._grow(fits) if fits else None,
            record=self._record(shown, card),
            next_shape=self._grow(fits + 1) if 0 < fits < limit else None,
            monotonic=not beyond,
            reached_limit=fits >= limit,
        )

    def _guess(self, card: Card, fits: int, fails: int) -> int:
        """Return the next number of steps to try, strictly between the two.

        Memory grows about evenly with the volume, so a line through what is known lands near the
        answer; it is taken while it still cuts, and else the middle.
        """
        middle = (fits + fails) // 2
        points = self._readings.needs(card)
        if len(points) < 2:
            return min(middle, 2 * fits)
        voxels = affordable_voxels(points, card.capacity_bytes)
        if voxels is None:
            return middle
        low, high = fits, fails
        while high - low > 1:  # the most steps within so many voxels
            steps = (low + high) // 2
            inside = math.prod(self._grow(steps)) <= voxels
            low, high = (steps, high) if inside else (low, steps)
        return max(fits + 1, min(fails - 1, low if low > fits else low + 1))

    def _record(self, steps: int, card: Card) -> Record:
        return self._readings.at(self._grow(steps), card)


def affordable_voxels(points: Sequence[tuple[int, int]], capacity_bytes: int) -> float | None:
    """Return how many voxels the capacity is about enough for, by the line through two readings.

    ``points``: two or more (voxels, bytes needed); those nearest to the capacity are taken. None
    where the larger volume of the two needs no more.
    """
    nearest = sorted(points, key=lambda point: abs(point[1] - capacity_bytes))[:2]
    (x0, y0), (x1, y1) = sorted(nearest)
    if y1 <= y0:
        return None
    return x0 + (capacity_bytes - y0) * (x1 - x0) / (y1 - y0)


def _most_steps(grow: Grow) -> int:
    """Return the most steps there may be: no side or volume beyond what suites may hold."""
    low, high = 1, MAX_SIDE
    while high - low > 1:
        steps = (low + high) // 2
        shape = grow(steps)
        small = max(shape) <= MAX_SIDE and math.prod(shape) <= MAX_VOXELS
        low, high = (steps, high) if small else (low, steps)
    return low
