"""The 2D U-Net that a convolutional LSTM reads each slice with.

Source: van de Leemput, Patel, Manniesing, "Full Volumetric Brain Tissue Segmentation in
Non-Contrast CT using Memory Efficient Convolutional LSTMs", section 2.1. The paper leaves open
whether anything follows the nearest-neighbour upsampling; both readings are here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from memsave.blocks import NormAct
from memsave.errors import UnknownNameError
from memsave.networks.norm_relu import find_norm_relu

__all__ = ["UPSAMPLINGS", "UNet2D"]

UPSAMPLINGS = ("nearest", "nearest_conv")


class UNet2D(nn.Module):
    """U-Net with concatenated skips; every convolution has a bias although a norm follows.

    Shapes: ``(N, in_channels, X, Y)`` to ``(N, out_channels, X, Y)``; sides multiples of
    ``2 ** (len(widths) - 1)``.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the result, of a 1x1 convolution.
        widths: channels of each level, finest first.
        norm: norm and activation, a name of ``NORM_ACTIVATIONS``.
        upsampling: ``"nearest"``, so that the decoder reads [skip, all channels from below]; or
            ``"nearest_conv"``, a 2x2 convolution to the skip's channels with norm and activation
            behind it, padded after the last row and column.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        norm: str = "batch_norm",
        upsampling: str = "nearest",
    ) -> None:
        super().__init__()
        if upsampling not in UPSAMPLINGS:
            raise UnknownNameError("upsampling", upsampling, UPSAMPLINGS)
        norm_relu = find_norm_relu(norm)
        fine_to_coarse = pairwise((in_channels, *widths))
        self.encoder = nn.ModuleList(_double_conv(i, o, norm_relu) for i, o in fine_to_coarse)
        self.pool = nn.MaxPool2d(2)
        self.upsampling = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for i, o in pairwise(tuple(widths)[::-1]):
            if upsampling == "nearest":
                self.upsampling.append(nn.Upsample(scale_factor=2, mode="nearest"))
                self.decoder.append(_double_conv(o + i, o, norm_relu))
            else:
                self.upsampling.append(_upsampled_conv(i, o, norm_relu))
                self.decoder.append(_double_conv(o + o, o, norm_relu))
        self.head = nn.Conv2d(widths[0], out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the maps of ``image``, with nothing behind the last convolution."""
        skips: list[Tensor] = []
        features = image
        for level, block in enumerate(self.encoder):
            if level > 0:
                skips.append(features)
                features = self.pool(features)
            features = block(features)
        for upsampling, block in zip(self.upsampling, self.decoder, strict=True):
            features = torch.cat([skips.pop(), _upsampled(features, upsampling)], dim=1)
            features = block(features)
        maps: Tensor = self.head(features)
        return maps


def _upsampled(features: Tensor, upsampling: nn.Module) -> Tensor:
    """Return the features upsampled, in their own type, where autocast would make them float32.

    The concatenation would then be in float32 too, twice the bytes, and the next convolution would
    make a half copy of it. Copies of half values lose nothing in half; gradients are the same.
    """
    kind = features.device.type
    if not isinstance(upsampling, nn.Upsample) or not torch.amp.is_autocast_available(kind):
        upsampled: Tensor = upsampling(features)
        return upsampled
    with torch.autocast(kind, enabled=False):
        in_own_type: Tensor = upsampling(features)
        return in_own_type


def _double_conv(in_channels: int, out_channels: int, norm_relu: NormAct) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, out_channels, 3, padding=1),
            norm1=norm_relu(out_channels, 2),
            conv2=nn.Conv2d(out_channels, out_channels, 3, padding=1),
            norm2=norm_relu(out_channels, 2),
        )
    )


def _upsampled_conv(in_channels: int, out_channels: int, norm_relu: NormAct) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            upsample=nn.Upsample(scale_factor=2, mode="nearest"),
            pad=nn.ZeroPad2d((0, 1, 0, 1)),  # a kernel of 2 would take one row and column away
            conv=nn.Conv2d(in_channels, out_channels, 2),
            norm=norm_relu(out_channels, 2),
        )
    )
