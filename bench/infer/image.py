"""A NIfTI volume in and its labels out: same affine, shape and header, all or nothing.

The pipeline sees canonical axes; the file's own come back when labels are written.
"""

from __future__ import annotations

import gzip
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.errors import MembenchError
from bench.preprocess import from_canonical, to_canonical
from bench.volumes import read_volume

__all__ = ["Image", "check_output", "read_image", "write_labels"]

_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """``voxels`` with canonical axes x, y, slices; ``source`` is nibabel's image of the file."""

    voxels: npt.NDArray[np.float32]
    spacing: tuple[float, float, float]  # mm, in x, y, slices
    source: Any


def read_image(path: Path) -> Image:
    """Return the volume that ``path`` holds.

    Errors: MembenchError for what is no NIfTI file, not 3D, truncated, damaged, without a usable
    affine, or of voxels that are not real numbers.
    """
    import nibabel

    volume = read_volume(path, path.name)
    source: Any = nibabel.load(path)
    kind = source.get_data_dtype()
    if kind.kind not in "biuf":
        raise MembenchError(
            f"{path} has voxels of type {kind}, not of one number each; convert it to a grey image"
        )
    try:
        whole = type(source).from_bytes(_unpacked(path)) if path.name.endswith(".gz") else source
        with np.errstate(over="ignore", invalid="ignore"):  # to infinity, which is dealt with later
            stored = np.asarray(whole.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise MembenchError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    stored = stored.reshape(stored.shape[:3])  # a fourth axis of length 1
    voxels = to_canonical(stored, source.affine)
    return Image(voxels=voxels, spacing=volume.spacing, source=source)


def _unpacked(path: Path) -> bytes:
    """Return what a gzip file holds, its checksum compared: nibabel stops short of that."""
    with gzip.open(path) as packed:
        return packed.read()


def check_output(output: Path, volume: Path, force: bool) -> None:
    """Raise MembenchError unless labels of ``volume`` can be written to ``output``.

    Looked at before the work: the name, the folder (a file is made there and removed), and that
    nothing is overwritten without ``force``, the volume itself never.
    """
    try:
        _check_output(output, volume, force)
    except OSError as error:
        raise _not_writable(output, error) from None


def _check_output(output: Path, volume: Path, force: bool) -> None:
    if not output.name.endswith(_SUFFIXES) or output.name in _SUFFIXES:
        raise MembenchError(f"output {output} is not named *.nii.gz or *.nii, as NIfTI files are")
    if output.is_dir():
        raise MembenchError(f"output {output} is a folder; name a file in it")
    if output.exists() and volume.exists() and output.samefile(volume):
        raise MembenchError(f"output {output} is the volume itself; choose another name")
    if output.exists() and not force:
        raise MembenchError(f"output {output} exists; choose another name or give --force")
    if not output.parent.is_dir():
        raise MembenchError(f"no folder {output.parent} to write {output.name} to; make it first")
    trial = _beside(output)
    trial.touch(exist_ok=False)
    trial.unlink()


def write_labels(output: Path, labels: npt.NDArray[np.uint8], image: Image) -> None:
    """Write canonical ``labels`` as a NIfTI file in the axes, shape and header of ``image``.

    The file appears whole under its name or not at all.
    Errors: MembenchError when it cannot be written.
    """
    source = image.source
    stored = np.ascontiguousarray(from_canonical(labels, source.affine)).reshape(source.shape)
    header = source.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0  # the image's grey window, not the labels'
    written = type(source)(stored, source.affine, header)
    part = _beside(output)
    try:
        written.to_filename(part)
        os.replace(part, output)
    except OSError as error:
        raise _not_writable(output, error) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _beside(output: Path) -> Path:
    """Return a hidden name in the same folder, so that renaming it is one move of the system."""
    return output.with_name(f".{os.getpid()}.{output.name}")


def _not_writable(output: Path, error: OSError) -> MembenchError:
    return MembenchError(
        f"cannot write {output}: {error.strerror or error}; choose another output with -o"
    )
