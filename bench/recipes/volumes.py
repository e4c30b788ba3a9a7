"""The volumes that a recipe trains on: one file and its labels, or two folders of them."""

from __future__ import annotations

from pathlib import Path

from bench.errors import MembenchError
from bench.training_data import LabelledVolume, read_labelled

__all__ = ["read_volumes"]

_SUFFIXES = (".nii.gz", ".nii")


def read_volumes(
    volumes: Path, labels: Path, spacing_mm: float | None = None
) -> list[LabelledVolume]:
    """Return the labelled volumes: a file and its labels, or all of a folder by equal names.

    Errors: MembenchError as ``read_labelled``; for a folder beside a file, an empty folder, or a
    volume without labels of its name.
    """
    if volumes.is_dir() != labels.is_dir():
        raise MembenchError(
            f"{volumes} and {labels} must be two NIfTI files or two folders of files of equal names"
        )
    if not volumes.is_dir():
        return [read_labelled(volumes, labels, spacing_mm)]
    files = sorted(path for path in volumes.iterdir() if path.name.endswith(_SUFFIXES))
    if not files:
        raise MembenchError(f"no volumes (*.nii, *.nii.gz) in {volumes}")
    missing = [path.name for path in files if not (labels / path.name).is_file()]
    if missing:
        raise MembenchError(f"{labels} has no labels {missing[0]!r}, of the volume of that name")
    return [read_labelled(path, labels / path.name, spacing_mm) for path in files]
