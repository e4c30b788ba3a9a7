"""PocketNet: U-Nets of three kinds of block whose channels stay the same on every level, or double.

Source: Celaya et al., "PocketNet: A Smaller Neural Network for 3D Medical Image Segmentation",
arXiv:2104.10745, Tables 1 (3D) and 2 (2D). No norm anywhere, a bias everywhere. The paper says that
weights start from a standard normal, which would overflow without a norm: they start from He's.
The two networks differ in more than their dimensions; the blocks are in ``pocket_blocks.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from memsave.networks.images import check_image
from memsave.networks.pocket_blocks import (
    BLOCKS_2D,
    BLOCKS_3D,
    conv_relu,
    find_pocket_block,
    he_initialise_,
)
from memsave.widths import positive, resolve_widths

__all__ = ["PocketNet2D", "PocketNet3D", "pocketnet_2d_divisor", "pocketnet_3d_divisor", "zyx"]

BASE_WIDTH = 16
LEVELS_3D = 5
LEVELS_2D = 4
DROPOUT_2D = 0.5
IN_PLANE = (1, 2, 2)  # slices are never pooled


class PocketNet3D(nn.Module):
    """The networks of Table 1, for a few slices at full resolution; logits out.

    Shapes: ``(N, in_channels, slices, Y, X)`` to ``(N, classes, slices, Y, X)``: slices first. X
    and Y multiples of ``2 ** (levels - 1)``, 16 with five levels; any number of slices.
    Parameters, with doubling widths and with pocket's: U-Net and ResNet 5,470,850 and 150,066,
    DenseNet 8,127,266 and 241,282.
    Errors: UnknownNameError and OptionError for options, InputError for an image's shape.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits, background included.
        block: ``"unet"``, ``"resnet"`` or ``"densenet"``.
        widths: a rule of ``memsave.widths`` or the channels of each level, finest first.
        base_width: channels of the finest level for a rule, 16 unless told.
        levels: levels for a rule, 5 unless told.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 2,
        block: str = "unet",
        widths: str | Sequence[int] = "doubling",
        base_width: int | None = None,
        levels: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        positive("classes", classes)
        self.widths = _widths(widths, base_width, levels, LEVELS_3D)
        make = find_pocket_block(block, BLOCKS_3D)
        coarse_to_fine = tuple(pairwise(self.widths[::-1]))
        self.encoder = nn.ModuleList(make(i, o) for i, o in pairwise((in_channels, *self.widths)))
        self.pool = nn.MaxPool3d(IN_PLANE)
        self.upsampling = nn.ModuleList(
            nn.ConvTranspose3d(i, o, IN_PLANE, stride=IN_PLANE) for i, o in coarse_to_fine
        )
        self.decoder = nn.ModuleList(make(2 * o, o) for _, o in coarse_to_fine)
        self.head = nn.Conv3d(self.widths[0], classes, 1)
        he_initialise_(self)

    @property
    def divisor(self) -> tuple[int, int, int]:
        """What each side must be a multiple of, in the order x, y, slices."""
        return (*_in_plane(self.widths), 1)

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that may be recomputed, in the order in which they run."""
        encoder = (f"encoder.{i}" for i in range(len(self.encoder)))
        return (*encoder, *(f"decoder.{i}" for i in range(len(self.decoder))))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of ``image``."""
        check_image(image, "PocketNet3D", self.in_channels, self.divisor[::-1], "slices, Y, X")
        skips: list[Tensor] = []
        features = image
        for level, block in enumerate(self.encoder):
            if level > 0:
                skips.append(features)
                features = self.pool(features)
            features = block(features)
        for upsampling, block in zip(self.upsampling, self.decoder, strict=True):
            features = block(torch.cat([upsampling(features), skips.pop()], dim=1))
        logits: Tensor = self.head(features)
        return logits


class PocketNet2D(nn.Module):
    """The networks of Table 2, for slices; probabilities out.

    Levels lie inside one another with no skip but the outermost: block, a linear 1x1 convolution
    where the channels change, max-pooling, the next level, a linear transposed convolution, block.

    Shapes: ``(N, in_channels, X, Y)`` to ``(N, classes, X, Y)``, each channel a sigmoid of its own;
    sides multiples of ``2 ** (levels - 1)``, 8 with four levels, the bottom's one block included.
    Parameters, with doubling widths and with pocket's: U-Net and ResNet 544,081 and 36,433,
    DenseNet 625,841 and 41,921.
    Arguments, Errors: as ``PocketNet3D``, but ``classes`` are the structures, background left out,
    and ``levels`` is 4 unless told.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 1,
        block: str = "unet",
        widths: str | Sequence[int] = "doubling",
        base_width: int | None = None,
        levels: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        positive("classes", classes)
        self.widths = _widths(widths, base_width, levels, LEVELS_2D)
        make = find_pocket_block(block, BLOCKS_2D)
        self.stem = conv_relu(in_channels, self.widths[0], 7, spatial_dims=2)
        self.encoder = nn.ModuleList(make(width) for width in self.widths)
        self.widening = nn.ModuleList(
            nn.Conv2d(i, o, 1) if i != o else nn.Identity() for i, o in pairwise(self.widths)
        )
        self.pool = nn.MaxPool2d(2)
        coarse_to_fine = tuple(pairwise(self.widths[::-1]))
        self.upsampling = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in coarse_to_fine
        )
        self.decoder = nn.ModuleList(make(o) for _, o in coarse_to_fine)
        self.dropout = nn.Dropout2d(DROPOUT_2D)
        self.head = nn.Conv2d(2 * self.widths[0], classes, 1)
        he_initialise_(self)

    @property
    def divisor(self) -> tuple[int, int]:
        """What each side must be a multiple of."""
        return _in_plane(self.widths)

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that may be recomputed, in the order in which they run."""
        encoder = (f"encoder.{i}" for i in range(len(self.encoder)))
        return (*encoder, *(f"decoder.{i}" for i in range(len(self.decoder))))

    def forward(self, image: Tensor) -> Tensor:
        """Return the probabilities of ``image``."""
        check_image(image, "PocketNet2D", self.in_channels, self.divisor, "X, Y")
        stem: Tensor = self.stem(image)
        features = self.encoder[0](stem)
        for widening, block in zip(self.widening, self.encoder[1:], strict=True):
            features = block(self.pool(widening(features)))
        for upsampling, block in zip(self.upsampling, self.decoder, strict=True):
            features = block(upsampling(features))
        features = self.dropout(torch.cat([stem, features], dim=1))
        logits: Tensor = self.head(features)
        return logits.to(image.dtype).sigmoid()  # half has no probability near 1


def pocketnet_3d_divisor(options: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return what x, y and slices must be multiples of with these options, building nothing."""
    return (*_in_plane(_option_widths(options, LEVELS_3D)), 1)


def pocketnet_2d_divisor(options: Mapping[str, Any]) -> tuple[int, int]:
    """Return what x and y must be multiples of with these options, building nothing."""
    return _in_plane(_option_widths(options, LEVELS_2D))


def zyx(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sides x, y, slices of ``shape`` as ``PocketNet3D`` takes them: slices, y, x."""
    return tuple(shape)[::-1]


def _option_widths(options: Mapping[str, Any], usual_levels: int) -> tuple[int, ...]:
    return _widths(
        options.get("widths", "doubling"),
        options.get("base_width"),
        options.get("levels"),
        usual_levels,
    )


def _widths(
    widths: str | Sequence[int], base_width: int | None, levels: int | None, usual_levels: int
) -> tuple[int, ...]:
    if isinstance(widths, str):
        base_width = BASE_WIDTH if base_width is None else base_width
        levels = usual_levels if levels is None else levels
    return resolve_widths(widths, base_width, levels)


def _in_plane(widths: Sequence[int]) -> tuple[int, int]:
    return (2 ** (len(widths) - 1),) * 2
