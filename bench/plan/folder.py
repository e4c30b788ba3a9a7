"""A folder of volumes as the shapes a network sees: each distinct padded shape once."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from bench.errors import MembenchError
from bench.shapes import MAX_VOXELS, Shape, format_shape, pad_to
from bench.volumes import Spacing, Volume, find_volumes, parse_spacing, resample_shape

__all__ = ["Folder", "FolderShape", "read_folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderShape:
    """One padded shape, and the files that have it; the largest of them first."""

    shape: Shape
    requested: Shape  # of the first file, before it was padded
    volumes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """The shapes of a folder's volumes, the largest first."""

    path: Path
    spacing: Spacing | None  # to which they were resampled; None: as they are
    divisor: Shape
    shapes: tuple[FolderShape, ...]
    sides: tuple[Shape, ...]  # of every volume, before it was padded

    @property
    def total(self) -> int:
        """How many volumes there are."""
        return len(self.sides)

    @property
    def median(self) -> Shape:
        """The median of each axis over all volumes; of an even number, of the upper middle."""
        return tuple(statistics.median_high(axis) for axis in zip(*self.sides, strict=True))


def read_folder(path: Path, spacing: str | None, divisor: Shape, network: str) -> Folder:
    """Return the shapes of the NIfTI files below ``path``, as ``membench run --volumes`` has them.

    ``spacing``: ``"1.62,1.62,3.22"`` mm, to which they are resampled first.
    Errors: MembenchError for a folder, a file or a spacing of no use, and a network in 2D.
    """
    if len(divisor) != 3:
        raise MembenchError(
            f"{network} takes slices of {len(divisor)} sides, and volumes have 3: leave out "
            "--volumes, and give the shape of a slice"
        )
    millimetres = None if spacing is None else parse_spacing(spacing)
    alike: dict[Shape, list[tuple[int, str, Shape]]] = {}
    sides: list[Shape] = []
    for volume in find_volumes(path):
        shape = _sides(volume, millimetres)
        sides.append(shape)
        alike.setdefault(pad_to(shape, divisor), []).append((-math.prod(shape), volume.name, shape))
    shapes = [
        FolderShape(
            shape=padded,
            requested=sorted(files)[0][2],
            volumes=tuple(name for _, name, _ in sorted(files)),
        )
        for padded, files in alike.items()
    ]
    shapes.sort(key=lambda one: (-math.prod(one.shape), one.shape))
    return Folder(
        path=path, spacing=millimetres, divisor=divisor, shapes=tuple(shapes), sides=tuple(sides)
    )


def _sides(volume: Volume, spacing: Spacing | None) -> Shape:
    shape = volume.shape if spacing is None else resample_shape(volume, spacing)
    if math.prod(shape) > MAX_VOXELS:
        raise MembenchError(
            f"{volume.path} would have {math.prod(shape)} voxels as {format_shape(shape)}, over "
            f"the limit of {MAX_VOXELS}: remove it, or resample it with --spacing"
        )
    return shape
