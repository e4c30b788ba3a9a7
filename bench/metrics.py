"""How well labels agree with a reference: Dice, Hausdorff distances, surface distance and Dice.

By class, in mm, from MONAI (https://monai.io), an optional dependency; distances of whole parts
from scipy. PocketNet reports Dice and the Hausdorff distance, "max" and "mean", of SimpleITK: the
mean, over all voxels of a part, of how far each lies outside of the other part, so that the
agreeing interior counts as 0. FLARE21 reports Dice and the normalised surface Dice (NSD), the share
of both surfaces that lies within a tolerance of the other one, weighed by area.

Where a class is empty: in both, they agree, Dice and NSD are 1 and distances 0; in one only, Dice
and NSD are 0 and distances unknown, None.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.errors import MembenchError

__all__ = ["Score", "mean_score", "require_metrics", "score", "score_part"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How two parts of one label agree. Distances in mm; None where one part is empty."""

    label: int
    voxels: int  # of the prediction
    reference_voxels: int
    dice: float
    hausdorff_mm: float | None  # the farthest that either surface lies from the other
    hausdorff_mean_mm: float | None  # over all voxels, the mean of both directions
    surface_distance_mm: float | None  # over the voxels of both surfaces
    surface_dice: float  # the share of both surfaces within the tolerance of the other


def require_metrics() -> Any:
    """Return the module ``monai.metrics``; MembenchError where MONAI is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own optional dependencies
            import monai.metrics
    except ImportError:
        raise MembenchError(
            "scores come from MONAI, which is not installed: pip install 'membench[train]'"
        ) from None
    return monai.metrics


def score(
    prediction: npt.NDArray[Any],
    reference: npt.NDArray[Any],
    spacing: Sequence[float],
    *,
    labels: Sequence[int] | None = None,
    tolerance_mm: float = 1.0,
) -> tuple[Score, ...]:
    """Return the scores of every label but 0, the background, that either array holds.

    Shapes:  both arrays of one shape, 2D or 3D, whole numbers; ``spacing`` in mm, one an axis.
    Args:
        labels: score these instead, whether or not they occur.
        tolerance_mm: of the surface Dice.
    Errors:  MembenchError without MONAI, for arrays of two shapes, or a tolerance below 0.
    """
    if prediction.shape != reference.shape:
        raise MembenchError(
            f"the prediction has {_sides(prediction)} voxels and the reference "
            f"{_sides(reference)}: both must be of one grid"
        )
    if not 0 <= tolerance_mm < math.inf:
        raise MembenchError(f"the tolerance is a distance in mm, 0 or more, got {tolerance_mm}")
    require_metrics()
    if labels is None:
        found = np.union1d(np.unique(prediction), np.unique(reference))
        labels = [int(label) for label in found if label != 0]
    return tuple(
        score_part(label, prediction == label, reference == label, spacing, tolerance_mm)
        for label in labels
    )


def score_part(
    label: int, prediction: Mask, reference: Mask, spacing: Sequence[float], tolerance_mm: float
) -> Score:
    """Return the scores of one label's two masks."""
    voxels, reference_voxels = int(prediction.sum()), int(reference.sum())
    if voxels and reference_voxels:
        from scipy import ndimage

        # Nothing outside of the box around both counts, and MONAI copies what it is given.
        (box,) = ndimage.find_objects((prediction | reference).astype(np.uint8))
        figures = _figures(prediction[box], reference[box], spacing, tolerance_mm)
    else:
        figures = _EMPTY_IN_BOTH if voxels == reference_voxels else _EMPTY_IN_ONE
    return Score(label=label, voxels=voxels, reference_voxels=reference_voxels, **figures)


_DISTANCES = ("hausdorff_mm", "hausdorff_mean_mm", "surface_distance_mm")
_EMPTY_IN_BOTH: dict[str, Any] = {
    "dice": 1.0,
    "surface_dice": 1.0,
    **dict.fromkeys(_DISTANCES, 0.0),
}
_EMPTY_IN_ONE: dict[str, Any] = {"dice": 0.0, "surface_dice": 0.0, **dict.fromkeys(_DISTANCES)}


def _figures(
    prediction: Mask, reference: Mask, spacing: Sequence[float], tolerance_mm: float
) -> dict[str, Any]:
    """Return the figures of two masks, neither of them empty."""
    metrics = require_metrics()
    parts = [
        torch.from_numpy(mask.astype(np.float32))[None, None] for mask in (prediction, reference)
    ]
    at = {"include_background": True, "spacing": [float(side) for side in spacing]}
    outside = [
        _outside_mm(*both, spacing) for both in ((prediction, reference), (reference, prediction))
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "monai", FutureWarning)  # of its calls to itself
        dice = metrics.compute_dice(*parts)
        hausdorff = metrics.compute_hausdorff_distance(*parts, **at)
        surface = metrics.compute_average_surface_distance(*parts, symmetric=True, **at)
        surface_dice = metrics.compute_surface_dice(
            *parts, [tolerance_mm], use_subvoxels=True, **at
        )
    return {
        "dice": float(dice),
        "hausdorff_mm": float(hausdorff),
        "hausdorff_mean_mm": math.fsum(outside) / 2,
        "surface_distance_mm": float(surface),
        "surface_dice": float(surface_dice),
    }


def _outside_mm(part: Mask, other: Mask, spacing: Sequence[float]) -> float:
    """Return the mean over the voxels of ``part`` of their distance to ``other``, 0 within it."""
    from scipy import ndimage

    distances = ndimage.distance_transform_edt(~other, sampling=[float(side) for side in spacing])
    return float(distances[part].mean(dtype=np.float64))


def mean_score(scores: Sequence[Score], name: str) -> float | None:
    """Return the mean of one figure over the labels that have it; None if none has."""
    known = [value for s in scores if (value := getattr(s, name)) is not None]
    return math.fsum(known) / len(known) if known else None


def _sides(array: npt.NDArray[Any]) -> str:
    return "x".join(map(str, array.shape))
