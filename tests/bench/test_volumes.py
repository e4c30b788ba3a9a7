"""Volumes: shapes from NIfTI headers, and the one line for each file that is of no use."""

from __future__ import annotations

import gzip
import importlib.util
import math
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.cifti2 import cifti2_axes

from bench.errors import MembenchError
from bench.suite import load_suite
from bench.volumes import find_volumes, parse_spacing, read_volume, resample_shape

SLICES_FIRST = np.array([[0, 0, -0.8, 9], [0, -0.7, 0, 9], [-3, 0, 0, 9], [0, 0, 0, 1.0]])


def write(path: Path, shape: tuple[int, ...], affine: Any = None) -> Path:
    """Write a volume of noise, which gzip cannot shrink to nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(0).integers(0, 30_000, shape).astype(np.int16)
    affine = np.eye(4) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)  # type: ignore[no-untyped-call]
    return path


def refusal(path: Path) -> str:
    with pytest.raises(MembenchError) as error:
        read_volume(path, path.name)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(str(path))


def test_images_are_found_in_the_layouts_of_the_public_sets_and_labels_are_not(
    tmp_path: Path,
) -> None:
    write(tmp_path / "case_00000/imaging.nii.gz", (4, 5, 6))
    write(tmp_path / "case_00000/segmentation.nii.gz", (4, 5, 6))
    write(tmp_path / "imagesTr/liver_0.nii.gz", (4, 5, 7))
    write(tmp_path / "labelsTr/liver_0.nii.gz", (4, 5, 7))
    write(tmp_path / "labelsTs/liver_1.nii.gz", (4, 5, 7))
    write(tmp_path / "a.nii", (4, 5, 8))
    (tmp_path / "._a.nii").write_bytes(b"what macOS leaves beside a file")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "unpacked.nii").mkdir()
    found = find_volumes(tmp_path)
    assert [(volume.name, volume.shape) for volume in found] == [
        ("a.nii", (4, 5, 8)),
        ("case_00000/imaging.nii.gz", (4, 5, 6)),
        ("imagesTr/liver_0.nii.gz", (4, 5, 7)),
    ]
    assert found[1].path == tmp_path / "case_00000/imaging.nii.gz"


def test_a_folder_that_is_itself_called_as_labels_are_is_read(tmp_path: Path) -> None:
    write(tmp_path / "labelsTr/a.nii", (4, 5, 6))
    assert [volume.name for volume in find_volumes(tmp_path / "labelsTr")] == ["a.nii"]


def test_a_file_stored_slices_first_is_brought_to_x_y_slices(tmp_path: Path) -> None:
    """KiTS19's way: the first stored axis runs along the slices, 3 mm apart."""
    volume = read_volume(write(tmp_path / "k.nii.gz", (10, 20, 30), SLICES_FIRST), "k")
    assert volume.shape == (30, 20, 10)
    assert volume.spacing == pytest.approx((0.8, 0.7, 3.0), rel=1e-6)  # a header keeps float32


def test_an_oblique_file_goes_to_its_closest_axes(tmp_path: Path) -> None:
    """Turned by 30 degrees about z, with stored axes y, z, x: still nearest to those."""
    turn = math.radians(30)
    rotation = np.array(
        [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = (rotation @ np.diag([0.5, 0.6, 2.0]))[:, [1, 2, 0]]
    volume = read_volume(write(tmp_path / "o.nii", (11, 12, 13), affine), "o")
    assert volume.shape == (13, 11, 12)
    assert volume.spacing == pytest.approx((0.5, 0.6, 2.0), rel=1e-6)


def test_a_trailing_axis_of_one_is_left_out_and_a_longer_one_refused(tmp_path: Path) -> None:
    assert read_volume(write(tmp_path / "one.nii", (4, 5, 6, 1)), "one").shape == (4, 5, 6)
    assert refusal(write(tmp_path / "four.nii", (4, 5, 6, 2))) == (
        " is not 3D: its header says 4x5x6x2; remove it or split it"
    )


def test_a_picture_is_not_3d(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "two.nii", (4, 5))) == (
        " is not 3D: its header says 4x5; remove it or split it"
    )


def test_a_negative_side_is_not_3d(tmp_path: Path) -> None:
    path = write(tmp_path / "n.nii", (4, 5, 6))
    content = bytearray(path.read_bytes())
    content[42:44] = (-4).to_bytes(2, "little", signed=True)  # dim[1]
    path.write_bytes(content)
    assert refusal(path) == " is not 3D: its header says -4x5x6; remove it or split it"


@pytest.mark.parametrize("lost_bytes", [1, 4000])
def test_a_cut_nii_is_truncated(tmp_path: Path, lost_bytes: int) -> None:
    """352 header bytes and 20 * 20 * 20 voxels of 2 bytes."""
    path = write(tmp_path / "c.nii", (20, 20, 20))
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    assert refusal(path) == " is truncated: its header announces 16352 bytes, more than there are"


@pytest.mark.parametrize("lost_bytes", [1, 4, 4000])
def test_a_cut_nii_gz_is_truncated(tmp_path: Path, lost_bytes: int) -> None:
    path = write(tmp_path / "c.nii.gz", (20, 20, 20))
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    assert refusal(path) == " is truncated: its header announces 16352 bytes, more than there are"


def test_a_gz_that_packs_too_few_voxels_is_truncated(tmp_path: Path) -> None:
    content = write(tmp_path / "c.nii", (20, 20, 20)).read_bytes()
    path = tmp_path / "short.nii.gz"
    path.write_bytes(gzip.compress(content[:-1]))
    assert refusal(path) == " is truncated: its header announces 16352 bytes, more than there are"


def test_a_gz_of_several_members_is_whole(tmp_path: Path) -> None:
    """As bgzip and concatenation make them; the last length then is not the file's."""
    content = write(tmp_path / "c.nii", (20, 20, 20)).read_bytes()
    path = tmp_path / "m.nii.gz"
    path.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert read_volume(path, "m").shape == (20, 20, 20)


def test_a_whole_gz_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c.nii.gz", (20, 20, 20))

    def unpack(*_: object, **__: object) -> None:
        raise AssertionError("unpacked")

    monkeypatch.setattr("bench.volumes.gzip.open", unpack)
    assert read_volume(path, "c").shape == (20, 20, 20)


@pytest.mark.parametrize(
    ("name", "kept_bytes"), [("h.nii", 0), ("h.nii", 100), ("h.nii.gz", 3), ("h.nii.gz", 100)]
)
def test_a_header_that_was_cut_is_told_without_further_output(
    tmp_path: Path, name: str, kept_bytes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, (20, 20, 20))
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert refusal(path).startswith(" is truncated or not a NIfTI file: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["t.nii", "t.nii.gz"])
def test_a_file_that_is_not_nifti_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("hello world " * 100)
    assert refusal(path).startswith(" is truncated or not a NIfTI file: ")


def test_an_unknown_data_type_is_told_without_further_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "d.nii", (4, 5, 6))
    content = bytearray(path.read_bytes())
    content[70:72] = (999).to_bytes(2, "little")
    path.write_bytes(content)
    assert refusal(path) == " is truncated or not a NIfTI file: data code 999 not recognized"
    assert capfd.readouterr() == ("", "")
    assert not nibabel.imageglobals.logger.disabled  # other users of nibabel still hear it


def test_a_path_that_is_no_file_is_not_called_a_broken_one(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent.nii.gz", f"no file {tmp_path / 'absent.nii.gz'} to read"),
        (tmp_path, f"{tmp_path} is a folder"),
    ):
        with pytest.raises(MembenchError, match=re.escape(message)):
            read_volume(path, path.name)


def test_a_file_of_surface_data_is_told(tmp_path: Path) -> None:
    """CIFTI-2 files end in .nii too, and nibabel reads them."""
    rows = cifti2_axes.ScalarAxis(["thickness"])  # type: ignore[no-untyped-call]
    columns = cifti2_axes.BrainModelAxis.from_mask(  # type: ignore[no-untyped-call]
        np.ones((2, 2, 2), bool), affine=np.eye(4)
    )
    data = np.zeros((1, 8), np.float32)
    path = tmp_path / "a.dscalar.nii"
    image = nibabel.Cifti2Image(data, (rows, columns))  # type: ignore[no-untyped-call]
    nibabel.save(image, path)
    assert refusal(path) == " is not a NIfTI volume, but a Cifti2Image"


@pytest.mark.parametrize("column", [0.0, math.nan])
def test_an_affine_that_orders_no_axes_is_told(tmp_path: Path, column: float) -> None:
    path = write(tmp_path / "f.nii", (4, 5, 6))
    content = bytearray(path.read_bytes())
    for row in range(3):  # srow_x, srow_y, srow_z: the first column of each
        content[280 + 16 * row : 284 + 16 * row] = np.float32(column).tobytes()
    path.write_bytes(content)
    assert refusal(path) == " has an affine that does not say which axis is x, y or slices"


def test_folders_that_are_missing_or_without_images_are_told(tmp_path: Path) -> None:
    with pytest.raises(MembenchError) as error:
        find_volumes(tmp_path / "none")
    assert str(error.value) == f"no folder {tmp_path / 'none'} to take volumes from"
    write(tmp_path / "labelsTr/a.nii", (4, 5, 6))
    with pytest.raises(MembenchError) as error:
        find_volumes(tmp_path)
    assert str(error.value) == (
        f"no image volumes (*.nii, *.nii.gz, labels aside) in {tmp_path} or its subfolders"
    )


def test_a_shape_is_resampled_as_the_paper_does(tmp_path: Path) -> None:
    """30 * 0.8 / 1.62 = 14.8, 20 * 0.7 / 1.62 = 8.6, 10 * 3 / 3.22 = 9.3; never below one."""
    volume = read_volume(write(tmp_path / "k.nii", (10, 20, 30), SLICES_FIRST), "k")
    assert resample_shape(volume, (1.62, 1.62, 3.22)) == (15, 9, 9)
    assert resample_shape(volume, (100.0, 100.0, 100.0)) == (1, 1, 1)


def test_a_spacing_that_makes_an_absurd_side_is_refused(tmp_path: Path) -> None:
    volume = read_volume(write(tmp_path / "k.nii", (10, 20, 30), SLICES_FIRST), "k")
    for x in (1e-5, 1e-308):  # 30 * 0.8 / 1e-5 = 2.4e6; the other is infinite
        with pytest.raises(MembenchError, match="over the limit of 65536"):
            resample_shape(volume, (x, 1.0, 1.0))


def test_a_folder_that_cannot_be_searched_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bool:  # as below a folder of another user's; root is never refused
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(MembenchError, match=r"cannot search .* for volumes: Permission denied"):
        find_volumes(tmp_path)


def test_spacing_is_three_positive_numbers() -> None:
    assert parse_spacing("1.62,1.62, 3") == (1.62, 1.62, 3.0)


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "1,0,1", "1,-1,1", "1,nan,1", "a,b,c"])
def test_another_spacing_is_refused(text: str) -> None:
    with pytest.raises(MembenchError) as error:
        parse_spacing(text)
    assert str(error.value) == (
        f"spacing {text!r} is not three positive numbers of mm, x, y, slices: 1.62,1.62,3.22"
    )


def test_the_mni152_head_goes_through_table1(tmp_path: Path) -> None:
    """A real volume: 197 x 233 x 189 at 1 mm, padded to multiples of 8, below the limit of 256."""
    package = importlib.util.find_spec("nilearn")  # not imported: that warns, and warnings fail
    if package is None or package.origin is None:
        pytest.skip("nilearn, which ships the MNI152 head, is not installed")
    head = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    shutil.copy(Path(package.origin).parent / "datasets/data" / head, tmp_path / head)
    suite = load_suite("table1")
    cases = suite.cases(volumes=tmp_path)
    assert [case.variant for case in cases] == list(
        dict.fromkeys(case.variant for case in suite.cases())
    )
    assert {(c.requested_shape, c.shape) for c in cases} == {((197, 233, 189), (200, 240, 192))}
    assert {case.volumes for case in cases} == {(head,)}
    resampled = suite.cases(volumes=tmp_path, spacing="1.62,1.62,3.22")
    assert resampled[0].requested_shape == (122, 144, 59)
    assert resampled[0].shape == (128, 144, 64)
