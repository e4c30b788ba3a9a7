"""What the papers do to a volume around their networks: axes, intensities, sizes, boxes, parts.

Arrays are numpy's, in voxels, axes x, y, slices, on the CPU. Sizes are changed with aligned voxel
edges: voxel i of n covers ``[i/n, (i+1)/n]`` of its axis, whatever n is, so images, labels and
boxes of one volume agree at every size.

Recipes are chains of these. KiTS19 of the FCN paper: ``resize`` to the shape that
``bench.volumes.resample_shape`` gives, ``window`` to -79..304 HU, ``zscore``. FLARE21's two stages
are in ``bench.infer``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.errors import MembenchError

__all__ = [
    "Box",
    "Shape3",
    "fill_nonfinite",
    "foreground_box",
    "from_canonical",
    "largest_component",
    "largest_components",
    "percentile_window",
    "resize",
    "resize_labels",
    "resize_scores",
    "to_canonical",
    "window",
    "zscore",
]

Shape3 = tuple[int, int, int]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
_Scalar = TypeVar("_Scalar", bound=np.generic)


# -- axes ---------------------------------------------------------------------------------------


def to_canonical(stored: npt.NDArray[_Scalar], affine: Any) -> npt.NDArray[_Scalar]:
    """Return a view of a file's voxels whose axes run to the right, to the front and headwards.

    Each stored axis goes to the world axis that it is closest to by the 4x4 ``affine``.
    """
    from nibabel.orientations import apply_orientation, io_orientation

    view: npt.NDArray[_Scalar] = apply_orientation(stored, io_orientation(affine))  # type: ignore[no-untyped-call]
    return view


def from_canonical(canonical: npt.NDArray[_Scalar], affine: Any) -> npt.NDArray[_Scalar]:
    """Return a view of canonical voxels in the axes of the file: ``to_canonical`` undone."""
    from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

    as_they_are = np.array([[0, 1], [1, 1], [2, 1]])
    back = ornt_transform(as_they_are, io_orientation(affine))  # type: ignore[no-untyped-call]
    view: npt.NDArray[_Scalar] = apply_orientation(canonical, back)  # type: ignore[no-untyped-call]
    return view


# -- intensities --------------------------------------------------------------------------------


def fill_nonfinite(voxels: Floats) -> tuple[Floats, int]:
    """Return the voxels with NaN and infinities set to the smallest finite one, and their count.

    The smallest: outside of the scanner's field of view, where such voxels lie, is air.
    Errors: MembenchError when no voxel is finite.
    """
    finite = np.isfinite(voxels)
    count = voxels.size - int(np.count_nonzero(finite))
    if count == 0:
        return voxels, 0
    if count == voxels.size:
        raise MembenchError("the volume has no finite voxel: there is nothing to segment")
    return np.where(finite, voxels, voxels[finite].min()), count


def window(voxels: Floats, low: float, high: float) -> Floats:
    """Return the voxels limited to ``low..high``, such as -79..304 HU."""
    return np.clip(voxels, np.float32(low), np.float32(high))


def percentile_window(voxels: Floats, low: float = 0.5, high: float = 99.5) -> Floats:
    """Return the voxels limited to two of their own percentiles: for CT and MR alike."""
    bottom, top = np.percentile(voxels, (low, high))
    return window(voxels, float(bottom), float(top))


def zscore(voxels: Floats) -> Floats:
    """Return the voxels less their mean, over their standard deviation; zeros if all are equal."""
    mean, deviation = voxels.mean(dtype=np.float64), voxels.std(dtype=np.float64)
    scaled: Floats = ((voxels - np.float32(mean)) / np.float32(deviation or 1.0)).astype(np.float32)
    return scaled


# -- sizes --------------------------------------------------------------------------------------


def resize(voxels: Floats, shape: Shape3) -> Floats:
    """Return an image at another size, trilinear, without smoothing before it shrinks."""
    resized: Floats = _trilinear(_tensor(voxels), shape).numpy()
    return resized


def resize_labels(labels: npt.NDArray[_Scalar], shape: Shape3) -> npt.NDArray[_Scalar]:
    """Return labels at another size: each voxel takes the one that holds its centre."""
    places = [
        (2 * np.arange(new) + 1) * old // (2 * new)  # floor((i + 1/2) * old / new), in integers
        for old, new in zip(labels.shape, shape, strict=True)
    ]
    return labels[np.ix_(*places)]


def resize_scores(scores_CXYZ: Tensor, shape: Shape3) -> Labels:
    """Return the class of highest trilinear score at another size; the lower class of equals.

    Shapes:  (classes, x, y, slices) float32 on the CPU -> ``shape`` uint8; at most 256 classes.
    Memory:  one class at a time: 9 bytes a voxel of ``shape``, however many classes there are.
    """
    best = _trilinear(scores_CXYZ[0], shape)
    labels = torch.zeros(shape, dtype=torch.uint8)
    for index in range(1, len(scores_CXYZ)):
        score = _trilinear(scores_CXYZ[index], shape)
        better = score > best
        labels[better] = index
        torch.maximum(best, score, out=best)
    found: Labels = labels.numpy()
    return found


def _tensor(voxels: Floats) -> Tensor:
    # torch takes neither negative strides, which a flipped axis has, nor read-only memory.
    return torch.from_numpy(np.require(voxels, np.float32, ["C_CONTIGUOUS", "WRITEABLE"]))


def _trilinear(volume: Tensor, shape: Shape3) -> Tensor:
    if tuple(volume.shape) == shape:
        return volume.clone()
    resized = F.interpolate(volume[None, None], size=shape, mode="trilinear", align_corners=False)
    return resized[0, 0]


# -- boxes --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Box:
    """Voxels ``start`` up to, not including, ``stop`` of each axis."""

    start: Shape3
    stop: Shape3

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """Return the box of all voxels of a volume."""
        x, y, z = shape
        return cls((0, 0, 0), (x, y, z))

    @property
    def shape(self) -> Shape3:
        """The sides of the box."""
        x, y, z = (stop - start for start, stop in zip(self.start, self.stop, strict=True))
        return x, y, z

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """What indexes the box's voxels out of a volume."""
        x, y, z = (slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))
        return x, y, z

    def scaled(self, shape: tuple[int, ...], new_shape: tuple[int, ...]) -> Box:
        """Return the box in the same volume at another size: all voxels that it touches."""
        sides = list(zip(self.start, self.stop, shape, new_shape, strict=True))
        x, y, z = (start * new // old for start, _, old, new in sides)
        x_stop, y_stop, z_stop = (-(-stop * new // old) for _, stop, old, new in sides)
        return Box((x, y, z), (x_stop, y_stop, z_stop))

    def grown(self, percent: int, shape: tuple[int, ...]) -> Box:
        """Return the box with ``percent`` of each axis of the volume more on both its sides.

        The margin is rounded up to whole voxels; what would lie outside of the volume is cut off.
        """
        sides = [
            (start, stop, -(-side * percent // 100), side)
            for start, stop, side in zip(self.start, self.stop, shape, strict=True)
        ]
        x, y, z = (max(0, start - margin) for start, _, margin, _ in sides)
        x_stop, y_stop, z_stop = (min(side, stop + margin) for _, stop, margin, side in sides)
        return Box((x, y, z), (x_stop, y_stop, z_stop))


def foreground_box(mask: Mask) -> Box | None:
    """Return the smallest box around the mask's largest component, None for an empty mask."""
    if not mask.any():
        return None
    component = largest_component(mask)
    spans = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        places = np.flatnonzero(component.any(axis=others))
        spans.append((int(places[0]), int(places[-1]) + 1))
    (x, x_stop), (y, y_stop), (z, z_stop) = spans
    return Box((x, y, z), (x_stop, y_stop, z_stop))


# -- parts --------------------------------------------------------------------------------------


def largest_component(mask: Mask, keep: int = 1) -> Mask:
    """Return the ``keep`` largest of a mask's connected components; an empty mask as it is.

    Voxels that touch, by a corner even, are connected. Of equals, the first in x, y, slices wins.
    """
    from scipy import ndimage

    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3), dtype=bool))
    if count <= keep:
        return mask
    sizes = np.bincount(components.ravel())[1:]  # without the background
    largest = 1 + np.argsort(-sizes, kind="stable")[:keep]
    found: Mask = np.isin(components, largest)
    return found


def largest_components(labels: Labels, keep: int = 1) -> Labels:
    """Return the labels with only the ``keep`` largest connected components of each left."""
    from scipy import ndimage

    kept = np.zeros_like(labels)
    for label, where in enumerate(ndimage.find_objects(labels), start=1):
        if where is not None:  # a label that occurs
            kept[where][largest_component(labels[where] == label, keep)] = label
    return kept
