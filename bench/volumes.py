"""NIfTI folders to input shapes: headers only, no voxel is read.

The axes of a file are brought to x, y, slices by its affine: each stored axis goes to the world
axis (left-right, back-front, foot-head) it is closest to. A file without orientation is taken as
stored in that order, as nibabel does.
"""

from __future__ import annotations

import gzip
import logging
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import MembenchError
from bench.shapes import MAX_SIDE

__all__ = ["Spacing", "Volume", "find_volumes", "parse_spacing", "read_volume", "resample_shape"]

Spacing = tuple[float, float, float]

_LABEL_FOLDERS = ("labelsTr", "labelsTs")
_LABEL_FILES = ("segmentation.nii", "segmentation.nii.gz")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """One image file: ``shape`` in voxels and ``spacing`` in mm, both in x, y, slices."""

    name: str  # path below the folder that was searched, with forward slashes
    path: Path
    shape: tuple[int, int, int]
    spacing: Spacing


def find_volumes(folder: Path) -> list[Volume]:
    """Return the image volumes below ``folder``, at any depth, by name.

    Images are ``*.nii`` and ``*.nii.gz``, so the layouts ``case_00000/imaging.nii.gz`` and
    ``imagesTr/*.nii.gz`` are both found. Labels are not images: ``segmentation.nii[.gz]`` and
    everything in folders ``labelsTr`` and ``labelsTs`` is left out, as are hidden files.

    Raises MembenchError for a folder that is missing or holds no images, and for the first file
    that ``read_volume`` refuses.
    """
    try:
        if not folder.is_dir():
            raise MembenchError(f"no folder {folder} to take volumes from")
        paths = sorted(_image_files(folder))
    except OSError as error:
        raise MembenchError(f"cannot search {folder} for volumes: {error.strerror}") from None
    if not paths:
        raise MembenchError(
            f"no image volumes (*.nii, *.nii.gz, labels aside) in {folder} or its subfolders"
        )
    return [read_volume(path, path.relative_to(folder).as_posix()) for path in paths]


def _image_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        below = path.relative_to(folder)
        labels = path.name in _LABEL_FILES or any(p in _LABEL_FOLDERS for p in below.parts[:-1])
        hidden = any(part.startswith(".") for part in below.parts)
        if path.name.endswith((".nii", ".nii.gz")) and not labels and not hidden and path.is_file():
            yield path


def read_volume(path: Path, name: str) -> Volume:
    """Return the volume whose header ``path`` holds.

    A fourth and further axes of length 1 are left out. Raises MembenchError for what is no NIfTI
    file, is not 3D, has no usable affine, or holds fewer bytes than its header announces.
    """
    image = _load(path)
    stored = tuple(int(side) for side in image.shape)
    if len(stored) < 3 or min(stored) < 1 or max(stored[3:], default=1) > 1:
        sides = "x".join(map(str, stored))
        raise MembenchError(f"{path} is not 3D: its header says {sides}; remove it or split it")
    _check_complete(path, image)
    axes = _world_axes(path, image.affine)
    # The length of each column of the affine: the spacing of an oblique file too.
    sizes = [math.hypot(*column) for column in image.affine[:3, :3].T.tolist()]
    shape, spacing = [0, 0, 0], [0.0, 0.0, 0.0]
    for stored_axis, axis in enumerate(axes):
        shape[axis], spacing[axis] = stored[stored_axis], sizes[stored_axis]
    return Volume(
        name=name,
        path=path,
        shape=(shape[0], shape[1], shape[2]),
        spacing=(spacing[0], spacing[1], spacing[2]),
    )


def _load(path: Path) -> Any:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.imageglobals import logger
    from nibabel.spatialimages import HeaderDataError

    if path.is_dir():
        raise MembenchError(f"{path} is a folder: name a NIfTI file in it")
    try:
        with _silenced(logger):  # what it would print says again what it raises
            image = nibabel.load(path)
    except FileNotFoundError:  # nibabel's own, which has no errno
        raise MembenchError(f"no file {path} to read a volume from") from None
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise MembenchError(f"{path} is truncated or not a NIfTI file: {reason}") from None
    if not isinstance(image, nibabel.Nifti1Image):  # NIfTI-2 is a subclass of it
        raise MembenchError(f"{path} is not a NIfTI volume, but a {type(image).__name__}")
    return image


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _world_axes(path: Path, affine: Any) -> list[int]:
    """Return, for each stored axis, the world axis (0 x, 1 y, 2 slices) it is closest to."""
    import numpy as np
    from nibabel.orientations import io_orientation

    readable = bool(np.isfinite(affine).all())
    axes = io_orientation(affine)[:, 0] if readable else np.full(3, np.nan)  # type: ignore[no-untyped-call]
    if np.isnan(axes).any():
        raise MembenchError(f"{path} has an affine that does not say which axis is x, y or slices")
    return [int(axis) for axis in axes]


def _check_complete(path: Path, image: Any) -> None:
    data = image.dataobj  # nibabel's proxy: knows where the voxels lie, has not read them
    expected = int(data.offset) + math.prod(image.shape) * int(data.dtype.itemsize)
    if path.name.endswith(".gz"):
        complete = _unpacks_to(path, expected)
    else:
        complete = path.stat().st_size >= expected
    if not complete:
        raise MembenchError(
            f"{path} is truncated: its header announces {expected} bytes, more than there are"
        )


def _unpacks_to(path: Path, expected: int) -> bool:
    """Whether a gzip file unpacks to at least ``expected`` bytes.

    A gzip file ends in its own unpacked length (modulo 2^32), which a cut file does not: where
    that agrees nothing is unpacked. Otherwise (cut, or packed in several members) it is counted.
    """
    with path.open("rb") as file:
        file.seek(-4, 2)
        if int.from_bytes(file.read(4), "little") == expected % 2**32:
            return True
    held = 0
    try:
        with gzip.open(path) as packed:
            while held < expected and (chunk := packed.read(_CHUNK_BYTES)):
                held += len(chunk)
    except (EOFError, OSError, zlib.error):  # cut or damaged
        return False
    return held >= expected


def parse_spacing(text: str) -> Spacing:
    """Return the three millimetres of ``"1.62,1.62,3.22"``: x, y, slices.

    Raises MembenchError unless there are three positive, finite numbers.
    """
    parts = text.split(",")
    numbers = [_millimetres(part) for part in parts]
    if len(numbers) != 3 or any(number is None for number in numbers):
        raise MembenchError(
            f"spacing {text!r} is not three positive numbers of mm, x, y, slices: 1.62,1.62,3.22"
        )
    x, y, slices = (number or 0.0 for number in numbers)
    return x, y, slices


def _millimetres(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*", text) and float(text) > 0 else None


def resample_shape(volume: Volume, spacing: Spacing) -> tuple[int, int, int]:
    """Return the shape ``volume`` has once resampled to ``spacing``: round(n * old / new) a side.

    A side that would vanish keeps one voxel. Halves round to even, as numpy rounds. Raises
    MembenchError for a side that would be over ``MAX_SIDE``.
    """
    sides = [
        side * old / new
        for side, old, new in zip(volume.shape, volume.spacing, spacing, strict=True)
    ]
    if max(sides) > MAX_SIDE:
        millimetres = ",".join(f"{new:g}" for new in spacing)
        raise MembenchError(
            f"spacing {millimetres} makes a side of {max(sides):.6g} voxels of {volume.path}, "
            f"over the limit of {MAX_SIDE}"
        )
    x, y, slices = (max(1, round(side)) for side in sides)
    return x, y, slices
