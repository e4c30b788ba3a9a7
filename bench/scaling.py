"""Memory against input size: records of one network at several sizes, as a line and its limits.

A series holds the records of one network and variant that differ in their shape alone. Its line,
``fixed_bytes + bytes_per_voxel * voxels``, is what least squares give for the relative deviation,
so that a small input weighs as much as a large one. An allocator rounds blocks and segments up,
and a network that recomputes is not quite linear: ``worst`` says how far the line misses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.record import Record
from bench.report.rows import Row
from bench.shapes import Shape

__all__ = ["CARD_GIB", "Line", "Point", "Series", "fit_line", "largest_shape", "make_series"]

CARD_GIB = (8, 12, 16, 24, 32, 48, 80)
"""Memory of the cards that people have, GiB. A real one gives a little less than its name says."""

_FEWEST = 3  # points that a line needs before its deviation says anything


@dataclass(frozen=True, slots=True)
class Point:
    """One case: its input's voxels, a batch's samples included, and the bytes that it takes.

    The bytes are what the case needs, context included; what it used where only that is known.
    """

    shape: Shape
    voxels: int
    bytes: int

    @property
    def bytes_per_voxel(self) -> float:
        """All of the bytes, the fixed ones too, over the voxels."""
        return self.bytes / self.voxels


@dataclass(frozen=True, slots=True)
class Line:
    """``fixed_bytes + bytes_per_voxel * voxels``; ``worst`` is its largest relative deviation."""

    fixed_bytes: float
    bytes_per_voxel: float
    worst: float

    def voxels(self, card_bytes: int) -> float:
        """Return the most voxels that ``card_bytes`` hold; 0 where not even one fits."""
        if self.bytes_per_voxel <= 0:
            return 0.0
        return max(0.0, (card_bytes - self.fixed_bytes) / self.bytes_per_voxel)


@dataclass(frozen=True, slots=True)
class Series:
    """A network and variant at several sizes, ascending by voxels."""

    record: Record  # stands for what all of them share
    points: tuple[Point, ...]

    @property
    def line(self) -> Line | None:
        """The fitted line; None for fewer than three sizes."""
        if len(self.points) < _FEWEST:
            return None
        return fit_line([p.voxels for p in self.points], [p.bytes for p in self.points])

    @property
    def grows_by_slices(self) -> bool:
        """Whether the sizes share their in-plane sides: then the largest one is a slice count."""
        return len({point.shape[:-1] for point in self.points}) == 1


def make_series(records: Iterable[Record]) -> list[Series]:
    """Return a series for each network, variant, mode, batch and precision, in their order.

    Cases that did not end, and those whose bytes are not known, are left out.
    """
    alike: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        options = json.dumps(record.definition.get("network_options", {}), sort_keys=True)
        key = (record.network, record.variant, record.mode, record.batch_size, record.precision)
        alike.setdefault((*key, options), []).append(record)
    found = [Series(of_one[0], _points(of_one)) for of_one in alike.values()]
    return [series for series in found if series.points]


def _points(records: Sequence[Record]) -> tuple[Point, ...]:
    points: dict[Shape, Point] = {}
    for record in records:
        row = Row(record, None)
        taken = row.needs_bytes if row.needs_bytes is not None else row.used_bytes
        if taken is not None:
            voxels = record.batch_size * math.prod(record.shape)
            points[record.shape] = Point(record.shape, voxels, taken)
    return tuple(sorted(points.values(), key=lambda point: point.voxels))


def fit_line(voxels: Sequence[int], sizes_bytes: Sequence[int]) -> Line:
    """Return the line through points (voxels, bytes) with the least squares of (fit - y) / y.

    Raises ValueError for fewer than two different sizes, which no line is decided by.
    """
    import numpy as np

    if len(set(voxels)) < 2:
        raise ValueError(f"a line needs two sizes, got {sorted(set(voxels))}")
    x, y = np.asarray(voxels, dtype=float), np.asarray(sizes_bytes, dtype=float)
    scale = x.max()  # voxels and ones differ by eight orders: the solver wants them alike
    weighted = np.stack([1 / y, x / scale / y], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(weighted, np.ones_like(y), rcond=None)
    deviation = np.abs((fixed + slope * x / scale) / y - 1)
    return Line(float(fixed), float(slope / scale), float(deviation.max()))


def largest_shape(series: Series, card_bytes: int, divisor: Sequence[int]) -> Shape | None:
    """Return the largest input that fits ``card_bytes`` by the series' line, None where none does.

    A cube (a square in 2D), or, for sizes that share their in-plane sides, so many slices. Each
    side is a multiple of what the network divides it by, ``divisor``.
    """
    line = series.line
    if line is None:
        return None
    voxels = line.voxels(card_bytes) / series.record.batch_size
    if series.grows_by_slices:
        plane = series.points[0].shape[:-1]
        slices = int(voxels // math.prod(plane)) // divisor[-1] * divisor[-1]
        return (*plane, slices) if slices else None
    dims = len(series.points[0].shape)
    step = math.lcm(*divisor)
    # By the root, since a line that hardly rises allows sides that no counting reaches; then to
    # the exact multiple, which the root may miss by its rounding.
    side = int(voxels ** (1 / dims)) // step * step
    side += step * ((side + step) ** dims <= voxels)
    return (side,) * dims if side else None
