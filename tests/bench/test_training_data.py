"""Labelled volumes: read, scaled, cut into crops that show image and labels of one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.errors import MembenchError
from bench.parity import Training
from bench.training_data import LabelledVolume, in_order, random_crops, read_labelled, whole
from tests.bench.parity_fixtures import SIDES, save, suite_file, training, volume

__all__ = ["suite_file", "training", "volume"]


def test_crops_come_from_the_seed_alone_and_lie_in_the_volume(training: Training) -> None:
    volume = training.volume
    first, again = (random_crops(volume, (8, 8, 16), 2, 3) for _ in range(2))
    for _ in range(3):
        (image, labels), (same, _) = next(first), next(again)
        assert image.shape == (2, 1, 8, 8, 16)
        assert labels.shape == (2, 8, 8, 16)
        assert torch.equal(image, same)
    places = {tuple(next(first)[0].flatten()[:3].tolist()) for _ in range(20)}
    assert len(places) > 10


def test_image_and_labels_are_cut_at_the_same_place(training: Training) -> None:
    """The image is its labels and noise of a tenth: they correlate, voxel by voxel."""
    for _, (image, labels) in zip(
        range(5), random_crops(training.volume, (8,) * 3, 1, 0), strict=False
    ):
        pair = torch.stack([image.flatten(), labels.flatten().float()])
        assert torch.corrcoef(pair)[0, 1] > 0.95


def test_a_volume_smaller_than_a_crop_is_padded_with_background(training: Training) -> None:
    image, labels = next(random_crops(training.volume, (24, 16, 16), 1, 0))
    assert labels[0, 19:].eq(0).all()
    assert image[0, 0, 19:].eq(training.volume.image.min()).all()


def test_the_whole_volume_marks_what_was_padded(training: Training) -> None:
    image, labels = whole(training.volume, (8, 8, 8))
    assert image.shape == (1, 1, 24, 24, 16)
    assert int((labels >= 0).sum()) == 19 * 17 * 16
    assert torch.equal(labels[0, :19, :17], training.volume.labels)
    turned, _ = in_order((image, labels), (2, 1, 0))
    assert turned.shape == (1, 1, 16, 24, 24)


def test_reading_scales_the_image_and_resamples_both(volume: tuple[Path, Path]) -> None:
    read = read_labelled(*volume, spacing_mm=2.0)
    assert read.shape == (10, 8, 8)  # 19, 17 and 16 halved: halves round to even
    assert read.labels.dtype == torch.int64
    assert set(read.labels.flatten().tolist()) == {0, 1, 2}
    assert read.image.mean().abs() < 1e-5  # float32 sums over 640 voxels
    assert read.image.std(correction=0) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(SIDES, 0.5, np.float32), "holds 0.5, which is no label"),
        (np.full(SIDES, 256, np.int16), "holds 256, which is no label"),
        (np.full(SIDES, -1, np.int16), "holds -1, which is no label"),
        (np.full(SIDES, np.nan, np.float32), "holds nan, which is no label"),
        (np.zeros(SIDES, np.uint8), "has no label but 0"),
        (np.ones((4, 4, 4), np.uint8), "are not of one grid"),
    ],
)
def test_labels_of_no_use_are_refused(volume: tuple[Path, Path], labels: Any, message: str) -> None:
    save(volume[1], labels)
    with pytest.raises(MembenchError, match=message):
        read_labelled(*volume, spacing_mm=None)


def test_a_crop_has_three_sides(training: Training) -> None:
    with pytest.raises(MembenchError, match="three sides, got 8x8"):
        next(random_crops(training.volume, (8, 8), 1, 0))


@pytest.mark.filterwarnings("ignore")  # nilearn's import warns of what it will drop
def test_the_mni152_head_has_tissue_where_its_maps_say() -> None:
    pytest.importorskip("nilearn")
    from bench.training_data import mni152_head

    head: LabelledVolume = mni152_head(spacing_mm=4.0)
    assert head.shape == (49, 58, 47)  # 197, 233, 189 mm
    counts = head.labels.flatten().bincount()
    millilitres = counts[1:] * 4.0**3 / 1000
    # A brain has 600 to 1200 ml of grey and 350 to 700 ml of white matter.
    assert 600 < millilitres[0] < 1200
    assert 350 < millilitres[1] < 700
    grey, white = (head.image[0][head.labels == c].mean() for c in (1, 2))
    assert white > grey > head.image.mean()  # T1: white matter is the brightest
