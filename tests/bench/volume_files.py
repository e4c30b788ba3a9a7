"""NIfTI files for tests, of any size: a header, and a hole in the file for the voxels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

__all__ = ["write_volumes"]

_HEADER_BYTES = 352


def write_volumes(folder: Path, shapes: Mapping[str, tuple[int, int, int]]) -> Path:
    """Write a ``.nii`` file of int8 at 1 x 1 x 2 mm for each name, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape in shapes.items():
        header: Any = nibabel.Nifti1Header()  # type: ignore[no-untyped-call]
        header.set_data_shape(shape)
        header.set_data_dtype(np.int8)
        header.set_sform(np.diag([1.0, 1.0, 2.0, 1.0]), code=1)
        with (folder / f"{name}.nii").open("wb") as file:
            header.write_to(file)
            file.truncate(_HEADER_BYTES + int(np.prod(shape)))
    return folder
