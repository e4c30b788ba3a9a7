"""``membench train`` and ``membench score`` from files to files: what they print and refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from bench.cli import app
from bench.infer.weights import load_weights
from memsave import networks

AFFINE = np.diag([2.0, 1.0, 3.0, 1.0])


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def save(path: Path, voxels: Any, affine: Any = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)  # type: ignore[no-untyped-call]
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A bright box in noise, and its label."""
    labels = np.zeros((16, 16, 5), dtype=np.uint8)
    labels[4:12, 5:11, 1:4] = 1
    image = np.random.default_rng(0).normal(0, 0.2, labels.shape) + labels
    return (
        save(tmp_path / "image.nii.gz", image.astype(np.float32)),
        save(tmp_path / "labels.nii.gz", labels),
    )


TINY = (
    *("--slices", 4, "--volumes", 3, "--frozen-volumes", 2, "--base-width", 2, "--levels", 2),
    *("--translation", 1, "--evaluate-every", 2, "--device", "cpu"),
)


def test_the_cclstm_is_trained_and_its_weights_load(pair: Any, tmp_path: Path) -> None:
    result = invoke("train", "cclstm", *pair, "-o", tmp_path / "w.pt", *TINY)
    assert result.exit_code == 0, result.output
    unet, recurrence, weights = result.stdout.splitlines()
    assert unet.startswith("unet: 4 steps, loss 0.")
    assert recurrence.startswith("recurrence: 3 steps, loss 0.")
    assert weights == f"weights: {tmp_path / 'w.pt'}"
    assert "unet step 2: loss " in result.stderr
    assert ", learning rate 1e-05" in result.stderr
    model = networks.build("conv_lstm", torch.load(tmp_path / "w.pt")["options"])
    load_weights(tmp_path / "w.pt", {"conv_lstm": model})


def test_json_has_every_step_and_nothing_else_is_printed(pair: Any, tmp_path: Path) -> None:
    result = invoke("train", "cclstm", *pair, "-o", tmp_path / "w.pt", *TINY, "--json")
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    assert [(s["stage"], s["step"]) for s in report["steps"]] == [
        *(("unet", i) for i in range(1, 5)),
        *(("recurrence", i) for i in range(1, 4)),
    ]
    assert report["recipe"]["checkpoint_every"] == 4
    assert report["network"] == "conv_lstm"


def test_states_of_all_slices_are_kept_where_every_is_0(pair: Any, tmp_path: Path) -> None:
    options = (*TINY, "--checkpoint-every", 0, "--json")
    result = invoke("train", "cclstm", *pair, "-o", tmp_path / "w.pt", *options)
    assert json.loads(result.stdout)["recipe"]["checkpoint_every"] is None


def test_pocketnet_is_trained_on_crops(pair: Any, tmp_path: Path) -> None:
    options = ("--crop", "16x16x5", "--epochs", 2, "--device", "cpu")
    result = invoke("train", "pocketnet_3d", *pair, "-o", tmp_path / "w.pt", *options)
    assert result.exit_code == 0, result.output
    assert "pocketnet_3d: 2 steps, loss 0." in result.stdout
    model = networks.build("pocketnet_3d", torch.load(tmp_path / "w.pt")["options"])
    load_weights(tmp_path / "w.pt", {"pocketnet_3d": model})


def test_the_commands_are_the_recipes() -> None:
    from bench.cli.train import train
    from bench.recipes.one_stage import RECIPES

    assert {command.name for command in train.registered_commands if command.name} == set(RECIPES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--slices", 0), "slices must be 1 or more, got 0"),
        (("--checkpoint-every", -1), "checkpoint_every must be 1 or more slices, got -1"),
        (("-o", "nowhere/w.pt"), "no folder nowhere to write w.pt to"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    options: tuple[object, ...], message: str, pair: Any, tmp_path: Path
) -> None:
    result = invoke("train", "cclstm", *pair, "-o", tmp_path / "w.pt", *TINY, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "w.pt").exists()


def test_weights_are_not_overwritten_without_force(pair: Any, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_text("mine")
    result = invoke("train", "cclstm", *pair, "-o", tmp_path / "w.pt", *TINY)
    assert result.exit_code == 2
    assert "exists; choose another name or give --force" in result.stderr
    assert (tmp_path / "w.pt").read_text() == "mine"
    assert (
        invoke("train", "cclstm", *pair, "-o", tmp_path / "w.pt", *TINY, "--force").exit_code == 0
    )


def test_cuda_without_a_gpu_says_so(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("train", "fcn", *pair, "-o", tmp_path / "w.pt", "--device", "cuda")
    assert result.exit_code == 2
    assert "torch sees no GPU; use --device cpu" in result.stderr


# -- score --------------------------------------------------------------------------------------


def shifted(tmp_path: Path, start: int, affine: Any = AFFINE) -> Path:
    labels = np.zeros((20, 16, 12), dtype=np.uint8)
    labels[start : start + 10, 4:10, 4:10] = 2
    return save(tmp_path / f"at_{start}.nii.gz", labels, affine)


def test_a_shift_of_three_voxels_of_2_mm_is_6_mm(tmp_path: Path) -> None:
    result = invoke("score", shifted(tmp_path, 5), shifted(tmp_path, 2), "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    (found,) = report["labels"]
    assert found["label"] == 2
    assert found["dice"] == pytest.approx(0.7)
    assert found["hausdorff_mm"] == pytest.approx(6)
    assert found["hausdorff_mean_mm"] == pytest.approx(1.2)
    assert report["mean"]["dice"] == found["dice"]
    assert report["spacing"] == [2, 1, 3]
    assert report["tolerance_mm"] == 1


def test_the_table_has_a_row_a_label_and_their_mean(tmp_path: Path) -> None:
    a, b = shifted(tmp_path, 5), shifted(tmp_path, 2)
    result = invoke("score", a, b, "--tolerance-mm", 2.5)
    assert "surface Dice at 2.5 mm" in result.stdout
    rows = [line for line in result.stdout.splitlines() if "0.7000" in line]
    assert [row.split()[1] for row in rows] == ["2", "mean"]
    assert "6.0000" in rows[0]


def test_a_label_without_a_distance_shows_none(tmp_path: Path) -> None:
    empty = save(tmp_path / "empty.nii.gz", np.zeros((20, 16, 12), dtype=np.uint8))
    result = invoke("score", shifted(tmp_path, 5), empty)
    assert result.exit_code == 0
    assert " - " in result.stdout
    assert "0.0000" in result.stdout


def test_files_of_two_grids_are_refused(tmp_path: Path) -> None:
    a = shifted(tmp_path, 5)
    other = save(tmp_path / "other.nii.gz", np.zeros((20, 16, 13), dtype=np.uint8))
    result = invoke("score", a, other)
    assert result.exit_code == 2
    assert "20x16x12 voxels and" in result.stderr
    moved = AFFINE.copy()
    moved[0, 3] = 4
    result = invoke("score", a, shifted(tmp_path, 2, moved))
    assert result.exit_code == 2
    assert "differ by up to 4: their voxels are at different places" in result.stderr


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_voxels_that_are_no_labels_are_refused(tmp_path: Path, value: float) -> None:
    a = shifted(tmp_path, 5)
    image = save(tmp_path / "image.nii", np.full((20, 16, 12), value, dtype=np.float32))
    result = invoke("score", a, image)
    assert result.exit_code == 2
    assert f"image.nii holds {value:g}, which is no label" in result.stderr
