"""The fully convolutional U-Net of the memory-efficient FCN paper, and its variants by option.

Source: Wang, Oda, Mori, "Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN".
The paper leaves the decoder open. Its parameter counts settle it: the upsampling is a transposed
convolution of kernel 1, in which 7 of 8 output voxels hold only the bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from memsave.blocks import DoubleConv, NormAct, find_block, find_norm
from memsave.errors import InputError
from memsave.widths import positive, resolve_widths

__all__ = ["FCN", "fcn_divisor"]


class FCN(nn.Module):
    """U-Net with in-place sums for skips; logits out, at the input's sides.

    Shapes: ``(N, in_channels, A, B, C)`` to ``(N, classes, A, B, C)``; each side a multiple of
    ``divisor``, 8 on every axis with the four levels of the paper.
    Parameters: 9,522,787 with ``double_conv``, 3,216,915 with ``bottleneck``, 2,784,542 with
    ``sepconv``, 2,635,395 with ``ccblock``, either norm.
    Memory: no skip outlives its sum, unless the pooling beside it keeps it for backward.
    Errors: UnknownNameError and OptionError for options, InputError for an input's shape.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits.
        widths: a rule of ``memsave.widths`` or the channels of each level, finest first.
        base_width: channels of the finest level for a rule, 64 unless told.
        levels: levels for a rule, 4 unless told; one pooling fewer.
        block: the encoder's block, by its name in ``memsave.blocks.BLOCKS``.
        norm: activation and norm of encoder and decoder, by name in ``memsave.blocks.NORMS``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 3,
        widths: str | Sequence[int] = "doubling",
        base_width: int | None = None,
        levels: int | None = None,
        block: str = "double_conv",
        norm: str = "batch_norm",
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        positive("classes", classes)
        self.widths = resolve_widths(widths, base_width, levels)
        norm_act = find_norm(norm)
        inputs = (in_channels, *self.widths)
        self.encoder = nn.ModuleList(
            find_block(block)(i, _half(o), o, norm_act, 3) for i, o in pairwise(inputs)
        )
        self.pool = nn.MaxPool3d(2)
        coarse_to_fine = self.widths[::-1]
        self.upsampling = nn.ModuleList(
            nn.ConvTranspose3d(i, o, 1, stride=2, output_padding=1)
            for i, o in pairwise(coarse_to_fine)
        )
        self.decoder = nn.ModuleList(_decoder_block(o, norm_act) for o in coarse_to_fine[1:])
        self.head = nn.Conv3d(self.widths[0], classes, 1)

    @property
    def divisor(self) -> tuple[int, int, int]:
        """What each side of the input must be a multiple of."""
        return _divisor(self.widths)

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that may be recomputed, in the order in which they run.

        Each starts with a convolution, so that none overwrites its own input.
        """
        encoder = (f"encoder.{i}" for i in range(len(self.encoder)))
        return (*encoder, *(f"decoder.{i}" for i in range(len(self.decoder))))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of ``image``."""
        self._check(image)
        skips: list[Tensor] = []
        features = image
        for level, block in enumerate(self.encoder):
            if level > 0:
                skips.append(features)
                features = self.pool(features)
            features = block(features)
        for upsampling, block in zip(self.upsampling, self.decoder, strict=True):
            features = upsampling(features)
            features += skips.pop()  # the other way round would overwrite what the pooling kept
            features = block(features)
        logits: Tensor = self.head(features)
        return logits

    def _check(self, image: Tensor) -> None:
        if image.dim() != 5 or image.shape[1] != self.in_channels:
            raise InputError(
                f"FCN takes images of shape (N, {self.in_channels}, A, B, C), "
                f"got {tuple(image.shape)}"
            )
        if any(side % d for side, d in zip(image.shape[2:], self.divisor, strict=True)):
            raise InputError(
                f"FCN pools {len(self.widths) - 1} times and needs sides that are multiples of "
                f"{self.divisor}, got {tuple(image.shape[2:])}: pad or crop the image"
            )


def fcn_divisor(options: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return what each side must be a multiple of with these options, building nothing."""
    widths = resolve_widths(
        options.get("widths", "doubling"), options.get("base_width"), options.get("levels")
    )
    return _divisor(widths)


def _divisor(widths: Sequence[int]) -> tuple[int, int, int]:
    return (2 ** (len(widths) - 1),) * 3


def _decoder_block(channels: int, norm_act: NormAct) -> nn.Module:
    return DoubleConv(channels, _half(channels), channels, norm_act)


def _half(channels: int) -> int:
    return max(1, channels // 2)
