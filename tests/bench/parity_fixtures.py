"""A tiny suite with a section ``parity``, and a tiny labelled volume, for tests of parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from bench.parity import Training
from bench.suite import load_suite
from bench.training_data import read_labelled

__all__ = ["SIDES", "SUITE", "save", "suite_file", "training", "volume"]

SIDES = (19, 17, 16)
SUITE = """\
title: Tiny
card: v100-32gb
include:
  - {network: fcn, variant: plain, shape: 8x8x8, widths: [4, 8]}
  - {network: fcn, variant: checkpoint, shape: 8x8x8, widths: [4, 8], techniques: [checkpoint]}
  - {network: fcn, variant: leaky, shape: 8x8x8, widths: [4, 8], norm: batch_norm_leaky_relu}
  - {network: fcn, variant: inplace, shape: 8x8x8, widths: [4, 8], norm: inplace_abn}
  - {network: fcn, variant: wide, shape: 16x8x8, widths: [4, 8], precision: fp16, batch: 2}
  - {network: fcn, variant: guess, shape: 8x8x8, widths: [4, 8], mode: infer}
  - {network: conv_lstm_unet, variant: flat, shape: 16x16, widths: [4, 8]}
parity:
  steps: 6
  steps_per_epoch: 2
  dice_every: 3
  spacing_mm: 1.0
  figures: [{title: Two, cases: ["fcn/plain/*", "fcn/wide/*"], note: the paper says so}]
  pairs:
    - {plain: fcn/plain/*, technique: fcn/checkpoint/*}
    - {plain: fcn/leaky/*, technique: fcn/inplace/*, band: 0.001}
"""


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SUITE)
    return path


@pytest.fixture
def volume(tmp_path: Path) -> tuple[Path, Path]:
    """An image of three grey levels and noise, and the levels as its labels, at 1 mm."""
    levels = np.indices(SIDES).sum(axis=0) // 6 % 3
    noise = np.random.default_rng(0).normal(0, 0.1, SIDES)
    image, labels = tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz"
    save(image, (levels + noise).astype(np.float32))
    save(labels, levels.astype(np.uint8))
    return image, labels


def save(path: Path, voxels: Any) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)  # type: ignore[no-untyped-call]


@pytest.fixture
def training(suite_file: Path, volume: tuple[Path, Path]) -> Training:
    settings = load_suite(str(suite_file)).file.parity
    assert settings is not None
    read = read_labelled(*volume, spacing_mm=None)
    return Training(volume=read, settings=settings, steps=4, seed=0, device="cpu")
