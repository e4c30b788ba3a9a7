"""Which of a folder's shapes fit a card, with few of them simulated.

A shape is said to fit only where it was simulated and fits, or one that is no smaller on any axis
was; and not to fit only where it was simulated and does not, or one that is no larger on any axis
was. Where two simulated shapes contradict that rule, every shape is simulated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.errors import MembenchError
from bench.plan.folder import Folder, FolderShape
from bench.plan.largest import affordable_voxels
from bench.plan.readings import NotSimulatedError, Readings
from bench.predict.cards import Card
from bench.record import Record
from bench.shapes import Shape

__all__ = ["Share", "find_share", "maxima", "within"]

_AT_ONCE = 2  # guesses, before what they give is looked at: more would often be wasted


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which shapes of a folder fit a card whole. Predicted."""

    folder: Folder
    card: Card
    fits: Mapping[Shape, bool]
    records: Mapping[Shape, Record]  # of those simulated
    monotonic: bool  # whether no shape fits that is larger than one that does not

    @property
    def fitting(self) -> int:
        """How many volumes fit."""
        return sum(len(one.volumes) for one in self.folder.shapes if self.fits[one.shape])

    @property
    def rest(self) -> tuple[FolderShape, ...]:
        """The shapes that do not fit, the largest first."""
        return tuple(one for one in self.folder.shapes if not self.fits[one.shape])


def within(small: Shape, large: Shape) -> bool:
    """Whether ``small`` is longer than ``large`` on no axis."""
    return all(a <= b for a, b in zip(small, large, strict=True))


def maxima(shapes: Iterable[Shape]) -> list[Shape]:
    """Return the shapes that lie within no other: the one that needs most is among them."""
    shapes = list(shapes)
    return [s for s in shapes if not any(o != s and within(s, o) for o in shapes)]


def find_share(
    readings: Readings,
    folder: Folder,
    card: Card,
    *,
    first: Sequence[Shape] = (),
    known: Mapping[Shape, bool] | None = None,
) -> Share:
    """Return which of the folder's shapes fit ``card`` with the techniques of ``readings``.

    ``first``: shapes that are simulated in any case. ``known``: what was simulated elsewhere.
    Errors: MembenchError where a shape cannot be simulated.
    """
    shapes = [one.shape for one in folder.shapes]
    sorting = _Sorting(shapes)
    for shape, fits in (known or {}).items():
        sorting.say(shape, fits)
    batch: Sequence[Shape] = first
    while batch or sorting.unknown:
        batch = batch or sorting.guesses(readings.needs(card), card.capacity_bytes)
        for shape, record in zip(batch, _simulate(readings, folder, batch, card), strict=True):
            sorting.say(shape, record.status == "ok", record)
        batch = ()
    monotonic = sorting.monotonic
    if not monotonic:
        for shape, record in zip(shapes, _simulate(readings, folder, shapes, card), strict=True):
            sorting.simulated[shape] = record.status == "ok"
            sorting.records[shape] = record
        sorting.fits = dict(sorting.simulated)
    return Share(
        folder=folder,
        card=card,
        fits={shape: sorting.fits[shape] for shape in shapes},
        records=sorting.records,
        monotonic=monotonic,
    )


def _simulate(
    readings: Readings, folder: Folder, shapes: Sequence[Shape], card: Card
) -> list[Record]:
    try:
        return readings.many(shapes, card)
    except NotSimulatedError as error:
        names = next(one.volumes for one in folder.shapes if one.shape == error.shape)
        raise MembenchError(f"volume {folder.path / names[0]}: {error}") from None


@dataclass(slots=True)
class _Sorting:
    """Sorts shapes into those that fit and those that do not, by what is said of some."""

    shapes: Sequence[Shape]
    fits: dict[Shape, bool] = field(default_factory=dict)
    simulated: dict[Shape, bool] = field(default_factory=dict)
    records: dict[Shape, Record] = field(default_factory=dict)

    @property
    def unknown(self) -> list[Shape]:
        return [shape for shape in self.shapes if shape not in self.fits]

    @property
    def monotonic(self) -> bool:
        """Whether nothing that was simulated fits though something within it does not."""
        failing = [shape for shape, fits in self.simulated.items() if not fits]
        fitting = [shape for shape, fits in self.simulated.items() if fits]
        return not any(within(small, large) for small in failing for large in fitting)

    def say(self, shape: Shape, fits: bool, record: Record | None = None) -> None:
        self.simulated[shape] = self.fits[shape] = fits
        if record is not None:
            self.records[shape] = record
        for other in self.unknown:
            if within(other, shape) if fits else within(shape, other):
                self.fits[other] = fits

    def guesses(self, points: Sequence[tuple[int, int]], capacity_bytes: int) -> list[Shape]:
        """Return the shapes to simulate next, one or two: those that would decide most others.

        By their voxels some seem to fit and some not. Of the first kind it is the shape with most
        others within it, of the second the one that lies within most others.
        """
        unknown = self.unknown
        limit = _limit(unknown, points, capacity_bytes)
        small = [shape for shape in unknown if math.prod(shape) <= limit]
        large = [shape for shape in unknown if math.prod(shape) > limit]
        best: list[Shape] = []
        while (small or large) and len(best) < _AT_ONCE:
            if small:
                best.append(max(small, key=lambda s: sum(within(o, s) for o in unknown)))
                small = [shape for shape in small if not within(shape, best[-1])]
            if large:
                best.append(max(large, key=lambda s: sum(within(s, o) for o in unknown)))
                large = [shape for shape in large if not within(best[-1], shape)]
        return best


def _limit(
    unknown: Sequence[Shape], points: Sequence[tuple[int, int]], capacity_bytes: int
) -> float:
    """Return the voxels up to which shapes seem to fit; their median where nothing is known."""
    if len(points) == 1:  # in proportion to the voxels, for what is taken beside is little
        points = [(0, 0), *points]
    voxels = affordable_voxels(points, capacity_bytes) if len(points) > 1 else None
    return statistics.median(map(math.prod, unknown)) if voxels is None else voxels
