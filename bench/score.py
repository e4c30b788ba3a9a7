"""Two label files of one grid, scored label by label."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.errors import MembenchError
from bench.infer.image import Image, read_image
from bench.metrics import Score, mean_score, score

__all__ = ["FIGURES", "FileScores", "score_files"]

FIGURES = tuple(
    f.name for f in fields(Score) if f.name not in ("label", "voxels", "reference_voxels")
)
_AFFINE_MM = 1e-3  # headers hold float32


@dataclass(frozen=True, slots=True, kw_only=True)
class FileScores:
    """What ``membench score`` says of two files."""

    prediction: str
    reference: str
    shape: tuple[int, ...]  # x, y, slices
    spacing: tuple[float, ...]  # mm
    tolerance_mm: float
    scores: tuple[Score, ...]  # of every label that occurs but 0, by its number

    def means(self) -> dict[str, float | None]:
        """Return the mean of each figure over the labels that have it."""
        return {name: mean_score(self.scores, name) for name in FIGURES}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of ``--json``."""
        data = asdict(self)
        return {**data, "labels": data.pop("scores"), "mean": self.means()}


def score_files(prediction: Path, reference: Path, tolerance_mm: float = 1.0) -> FileScores:
    """Return how the labels in ``prediction`` agree with those in ``reference``.

    Errors: MembenchError for files that ``read_image`` refuses, of different shapes or affines, of
    voxels that are no labels, and without MONAI.
    """
    ours, theirs = read_image(prediction), read_image(reference)
    _check_one_grid(prediction, ours, reference, theirs)
    return FileScores(
        prediction=str(prediction),
        reference=str(reference),
        shape=ours.voxels.shape,
        spacing=ours.spacing,
        tolerance_mm=tolerance_mm,
        scores=score(
            _labels(prediction, ours),
            _labels(reference, theirs),
            ours.spacing,
            tolerance_mm=tolerance_mm,
        ),
    )


def _check_one_grid(path: Path, ours: Image, other: Path, theirs: Image) -> None:
    shape, other_shape = (image.source.shape[:3] for image in (ours, theirs))
    if shape != other_shape:
        a, b = ("x".join(map(str, sides)) for sides in (shape, other_shape))
        raise MembenchError(f"{path} has {a} voxels and {other} {b}: resample one to the other")
    difference = float(np.abs(ours.source.affine - theirs.source.affine).max())
    if difference > _AFFINE_MM:
        raise MembenchError(
            f"the affines of {path} and {other} differ by up to {difference:.3g}: their voxels are "
            "at different places; resample one to the other"
        )


def _labels(path: Path, image: Image) -> npt.NDArray[np.int64]:
    whole = np.isfinite(image.voxels) & (image.voxels == np.rint(image.voxels))
    if not whole.all():
        raise MembenchError(
            f"{path} holds {image.voxels[~whole][0]:g}, which is no label: labels are whole numbers"
        )
    return image.voxels.astype(np.int64)
