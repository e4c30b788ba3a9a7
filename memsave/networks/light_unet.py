"""The light 3D U-Net that finds the abdomen in FLARE21's fast low-memory entry.

Source: He, Luo, "Fast and Low GPU Memory Abdominal organ segmentation", FLARE 2021, section 2.1.
The paper gives neither widths nor blocks; our choice is the 3D U-Net of Cicek et al. 2016 with
channels 8, 16, 32, 64: convolutions of 3 with BatchNorm and ReLU, max-pooling, transposed
convolutions of 2, concatenated skips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from memsave.blocks import DoubleConv
from memsave.networks.images import check_image
from memsave.networks.norm_relu import find_norm_relu
from memsave.widths import positive, resolve_widths

__all__ = ["LightUNet", "light_unet_divisor"]

BASE_WIDTH = 8


class LightUNet(nn.Module):
    """A 3D U-Net of few channels; logits out, at the input's sides.

    Shapes: ``(N, in_channels, A, B, C)`` to ``(N, classes, A, B, C)``; sides multiples of
    ``2 ** (levels - 1)``, 8 with four levels.
    Errors: UnknownNameError and OptionError for options, InputError for an image's shape.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits, background included.
        widths: a rule of ``memsave.widths`` or the channels of each level, finest first.
        base_width: channels of the finest level for a rule, 8 unless told.
        levels: levels for a rule, 4 unless told.
        norm: norm and activation: ``"batch_norm"`` or ``"inplace_abn"``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 2,
        widths: str | Sequence[int] = "doubling",
        base_width: int | None = None,
        levels: int | None = None,
        norm: str = "batch_norm",
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        positive("classes", classes)
        self.widths = _widths(widths, base_width, levels)
        norm_relu = find_norm_relu(norm)
        coarse_to_fine = tuple(pairwise(self.widths[::-1]))
        self.encoder = nn.ModuleList(
            DoubleConv(i, o, o, norm_relu) for i, o in pairwise((in_channels, *self.widths))
        )
        self.pool = nn.MaxPool3d(2)
        self.upsampling = nn.ModuleList(
            nn.ConvTranspose3d(i, o, 2, stride=2) for i, o in coarse_to_fine
        )
        self.decoder = nn.ModuleList(DoubleConv(2 * o, o, o, norm_relu) for _, o in coarse_to_fine)
        self.head = nn.Conv3d(self.widths[0], classes, 1)

    @property
    def divisor(self) -> tuple[int, int, int]:
        """What each side of the input must be a multiple of."""
        return _divisor(self.widths)

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that may be recomputed, in the order in which they run."""
        encoder = (f"encoder.{i}" for i in range(len(self.encoder)))
        return (*encoder, *(f"decoder.{i}" for i in range(len(self.decoder))))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of ``image``."""
        check_image(image, "LightUNet", self.in_channels, self.divisor, "A, B, C")
        skips: list[Tensor] = []
        features = image
        for level, block in enumerate(self.encoder):
            if level > 0:
                skips.append(features)
                features = self.pool(features)
            features = block(features)
        for upsampling, block in zip(self.upsampling, self.decoder, strict=True):
            features = block(torch.cat([skips.pop(), upsampling(features)], dim=1))
        logits: Tensor = self.head(features)
        return logits


def light_unet_divisor(options: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return what each side must be a multiple of with these options, building nothing."""
    return _divisor(
        _widths(options.get("widths", "doubling"), options.get("base_width"), options.get("levels"))
    )


def _widths(
    widths: str | Sequence[int], base_width: int | None, levels: int | None
) -> tuple[int, ...]:
    if base_width is None and isinstance(widths, str):
        base_width = BASE_WIDTH
    return resolve_widths(widths, base_width, levels)


def _divisor(widths: Sequence[int]) -> tuple[int, int, int]:
    return (2 ** (len(widths) - 1),) * 3
