"""Labelled volumes to train on: read, resampled and scaled once, then cut into random crops.

Axes are x, y, slices throughout; a network that takes its sides in another order gets them so by
``in_order``. The volumes stay on the CPU; the training loop moves each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.errors import MembenchError
from bench.preprocess import (
    Shape3,
    fill_nonfinite,
    percentile_window,
    resize,
    resize_labels,
    resize_scores,
    to_canonical,
    zscore,
)
from bench.shapes import format_shape, pad_to

__all__ = [
    "LabelledVolume",
    "in_order",
    "mni152_head",
    "random_crops",
    "read_labelled",
    "whole",
]

Floats = npt.NDArray[np.float32]
_MOST_CLASSES = 256  # labels are bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledVolume:
    """An image and its labels, voxel by voxel."""

    name: str
    image: Tensor  # (1, x, y, slices) float32, z-scored
    labels: Tensor  # (x, y, slices) int64, from 0, the background
    class_names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels in x, y, slices."""
        return tuple(self.labels.shape)


def mni152_head(spacing_mm: float = 3.0) -> LabelledVolume:
    """Return the MNI152 template that nilearn ships: a T1 head, background, grey, white matter.

    A voxel's label is what its two tissue maps make most likely, the rest being background. No
    download takes place. It is an average of 152 heads: good to compare two ways of training on,
    not to learn anything about patients.

    Errors: MembenchError where nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError:
        raise MembenchError(
            "the MNI152 head comes with nilearn, which is not installed: pip install nilearn, or "
            "train on a volume of your own with --image FILE --labels FILE"
        ) from None
    maps = []
    for load in (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
    ):
        source = load(resolution=1)  # as it is stored
        stored = np.asarray(source.dataobj, dtype=np.float32)
        maps.append(to_canonical(stored, source.affine))
    head, grey, white = maps
    shape = _resampled(head.shape, (1.0, 1.0, 1.0), spacing_mm)
    scores = torch.from_numpy(np.stack([1 - grey - white, grey, white]))
    return _labelled(
        "MNI152", head, shape, resize_scores(scores, shape), ("background", "grey", "white")
    )


def read_labelled(image: Path, labels: Path, spacing_mm: float | None) -> LabelledVolume:
    """Return an image and its labels from two NIfTI files of one grid.

    Labels are whole numbers from 0, the background, to 255. ``spacing_mm`` None keeps the file's.

    Errors: MembenchError for what ``bench.infer.image.read_image`` refuses, for files of two
    grids, labels that are no whole numbers of that range, and labels without any foreground.
    """
    from bench.infer.image import read_image

    picture, marks = read_image(image), read_image(labels)
    if picture.voxels.shape != marks.voxels.shape or not np.allclose(
        picture.source.affine, marks.source.affine, atol=1e-3
    ):
        raise MembenchError(
            f"{image} and {labels} are not of one grid: shapes {picture.voxels.shape} and "
            f"{marks.voxels.shape}, or affines that differ; resample the labels to the image"
        )
    classes = _class_numbers(marks.voxels, labels)
    shape = tuple(classes.shape)
    if spacing_mm is not None:
        shape = _resampled(shape, picture.spacing, spacing_mm)
    x, y, z = shape
    names = ("background", *(f"label {i}" for i in range(1, int(classes.max()) + 1)))
    resized = resize_labels(classes, (x, y, z))
    return _labelled(image.name, picture.voxels, (x, y, z), resized, names)


def _class_numbers(voxels: Floats, path: Path) -> npt.NDArray[np.uint8]:
    usable = np.isfinite(voxels) & (voxels >= 0) & (voxels < _MOST_CLASSES)
    whole_numbers = np.where(usable, voxels, 0).astype(np.uint8)
    wrong = voxels[~usable | (whole_numbers != voxels)]
    if wrong.size:
        raise MembenchError(
            f"{path} holds {wrong[0]:g}, which is no label: labels are whole numbers, 0 to "
            f"{_MOST_CLASSES - 1}"
        )
    if not whole_numbers.any():
        raise MembenchError(f"{path} has no label but 0, the background: there is nothing to learn")
    return whole_numbers


def _labelled(
    name: str, voxels: Floats, shape: Shape3, labels: Any, class_names: tuple[str, ...]
) -> LabelledVolume:
    finite, _ = fill_nonfinite(voxels)
    scaled = zscore(percentile_window(resize(finite, shape)))
    return LabelledVolume(
        name=name,
        image=torch.from_numpy(np.ascontiguousarray(scaled))[None],
        labels=torch.from_numpy(np.ascontiguousarray(labels)).long(),
        class_names=class_names,
    )


def _resampled(
    shape: Sequence[int], spacing: tuple[float, float, float], spacing_mm: float
) -> Shape3:
    x, y, z = (
        max(1, round(side * old / spacing_mm)) for side, old in zip(shape, spacing, strict=True)
    )
    return x, y, z


def random_crops(
    volume: LabelledVolume, sides: tuple[int, ...], batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of crops without end: images (N, 1, *sides), labels (N, *sides).

    Every place is equally likely, drawn from ``seed`` alone, so that two trainings see the same
    crops. A volume smaller than a crop is padded at its upper ends, with the image's lowest value
    and background.
    """
    if len(sides) != 3:
        raise MembenchError(f"crops of a volume have three sides, got {format_shape(sides)}")
    image, labels = _at_least(volume, sides)
    generator = torch.Generator().manual_seed(seed)
    room = [whole - side + 1 for whole, side in zip(labels.shape, sides, strict=True)]
    while True:
        crops = []
        for _ in range(batch_size):
            starts = [int(torch.randint(r, (), generator=generator)) for r in room]
            x, y, z = (slice(s, s + side) for s, side in zip(starts, sides, strict=True))
            crops.append((image[:, x, y, z], labels[x, y, z]))
        yield torch.stack([c[0] for c in crops]), torch.stack([c[1] for c in crops])


def whole(volume: LabelledVolume, divisor: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the whole volume as a batch of one, each side padded up to a multiple of ``divisor``.

    What was padded is marked in the labels by -1.
    """
    x, y, z = pad_to(volume.shape, tuple(divisor))
    image, labels = _at_least(volume, (x, y, z), label=-1)
    return image[None], labels[None]


def _at_least(
    volume: LabelledVolume, sides: Sequence[int], label: int = 0
) -> tuple[Tensor, Tensor]:
    """Return image and labels, padded at their upper ends to ``sides`` at least."""
    missing = [max(0, side - own) for side, own in zip(sides, volume.shape, strict=True)]
    around = [n for side in reversed(missing) for n in (0, side)]
    image = F.pad(volume.image, around, value=float(volume.image.min()))
    return image, F.pad(volume.labels, around, value=label)


def in_order(batch: tuple[Tensor, Tensor], order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a batch with its sides (x, y, slices) in ``order``, such as (2, 1, 0)."""
    image, labels = batch
    return image.permute(0, 1, *(2 + i for i in order)), labels.permute(0, *(1 + i for i in order))
