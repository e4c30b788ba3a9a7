"""Random rotations and translations of a volume and its mask, together.

A movement is rigid in voxels: on a grid whose sides differ by much, resample first. One slice of a
moved volume is computed by itself, at a slice's cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["STILL", "Movement", "random_movement"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Movement:
    """Rotations in degrees about x, y and slices, in this order, about the centre; then voxels."""

    degrees: tuple[float, float, float]
    voxels: tuple[float, float, float]

    def image(self, voxels: Floats, z: int | None = None) -> Floats:
        """Return the moved image, or its slice ``z``; what comes into view is its lowest value."""
        return self._moved(voxels, z, order=1, outside=float(voxels.min()))

    def mask(self, mask: Floats, z: int | None = None) -> Floats:
        """Return the moved mask, or its slice ``z``: nearest voxels, so 0 and 1 stay 0 and 1."""
        return self._moved(mask, z, order=0, outside=0.0)

    def _moved(self, voxels: Floats, z: int | None, order: int, outside: float) -> Floats:
        from scipy import ndimage

        if self == STILL:
            return voxels if z is None else voxels[..., z]
        # Of the result's voxel i, the source is at R^-1 (i - t - centre) + centre.
        back = _rotation(self.degrees).T
        centre = (np.array(voxels.shape) - 1) / 2
        offset = centre - back @ (centre + np.array(self.voxels))
        shape = voxels.shape
        if z is not None:
            offset, shape = offset + back[:, 2] * z, (*shape[:2], 1)
        moved: Floats = ndimage.affine_transform(
            voxels, back, offset, shape, order=order, mode="constant", cval=outside
        )
        return moved if z is None else moved[..., 0]


STILL = Movement((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def random_movement(generator: np.random.Generator, degrees: float, voxels: float) -> Movement:
    """Return a movement whose three angles and three shifts are uniform in +- these limits."""
    rx, ry, rz = generator.uniform(-degrees, degrees, 3).tolist()
    x, y, z = generator.uniform(-voxels, voxels, 3).tolist()
    return Movement((rx, ry, rz), (x, y, z))


def _rotation(degrees: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    from scipy.spatial.transform import Rotation

    matrix: npt.NDArray[np.float64] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    return matrix
