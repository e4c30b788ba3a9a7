"""The video ResNet: its parameters by hand, its shapes, what it refuses."""

from __future__ import annotations

import pytest
import torch

from memsave.errors import InputError
from memsave.networks.video_resnet import VideoResNet


def test_r3d_18_has_the_parameters_of_its_layers() -> None:
    """Convolutions without bias, two numbers a channel for each BatchNorm, and the head."""
    widths, before = (64, 128, 256, 512), 64
    count = 3 * 64 * 3 * 7 * 7 + 2 * 64
    for o in widths:
        count += 27 * before * o + 27 * o * o + 4 * o  # the first block
        count += (before * o + 2 * o) if before != o else 0  # its shortcut
        count += 2 * 27 * o * o + 4 * o  # the second
        before = o
    count += 512 * 400 + 400
    with torch.device("meta"):
        model = VideoResNet()
    assert sum(p.numel() for p in model.parameters()) == count == 33_371_472


def test_a_clip_gives_one_vector_of_logits_and_stages_halve_the_sides() -> None:
    model = VideoResNet(classes=5, widths=(2, 3, 4), blocks=1)
    clip = torch.rand(2, 3, 8, 16, 16)
    assert model(clip).shape == (2, 5)
    assert model.stages(model.stem(clip)).shape == (2, 4, 2, 2, 2)


def test_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"clips of shape \(N, 3, frames"):
        VideoResNet(widths=(2,), blocks=1)(torch.rand(1, 1, 8, 8, 8))
