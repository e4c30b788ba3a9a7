"""DenseVNet as FLARE21's fast low-memory entry uses it: dense stacks at 1/2, 1/4 and 1/8.

Source: He, Luo, "Fast and Low GPU Memory Abdominal organ segmentation", FLARE 2021; the network is
Gibson et al., "Automatic multi-organ segmentation on abdominal CT with dense V-networks", IEEE TMI
2018. The entry's text says that the stacks' outputs are added; its parameter count, 871,922, says
that they are concatenated, with the pooled image. TensorFlow pads a stride of 2 asymmetrically;
our choice is kernel // 2 on both sides, and that averages leave the padding out, as its do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsave.blocks import NormAct
from memsave.errors import OptionError
from memsave.networks.images import check_image
from memsave.networks.norm_relu import find_norm_alone, find_norm_relu
from memsave.widths import positive

__all__ = ["DenseStack", "DenseVNet", "dense_vnet_divisor"]

STEM = 24  # channels of the first convolution, and of each down convolution
LAYERS = (5, 10, 10)
GROWTHS = (4, 8, 16)
SKIPS = (12, 24, 24)
DIVISOR = (8, 8, 8)


class DenseStack(nn.Module):
    """Layers of convolution, norm, activation, dropout, each reading all before it.

    Shapes: ``(N, i, *)`` to ``(N, i + layers * growth, *)``: what comes in stands first.
    Memory: each layer keeps the concatenation that it reads, so the stack keeps channels that
    grow with the square of its layers.
    """

    def __init__(
        self, in_channels: int, layers: int, growth: int, norm_relu: NormAct, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for index in range(layers):
            layer = _conv_norm(in_channels + index * growth, growth, norm_relu)
            if dropout > 0 and index < layers - 1:
                layer.append(nn.Dropout(dropout))
            self.layers.append(layer)
        self.out_channels = in_channels + layers * growth

    def forward(self, features: Tensor) -> Tensor:
        """Return ``features`` and what every layer made."""
        for layer in self.layers:
            features = torch.cat([features, layer(features)], dim=1)
        return features


class DenseVNet(nn.Module):
    """Three dense stacks whose outputs are resized to half the image's sides and read together.

    Shapes: ``(N, in_channels, A, B, C)`` to ``(N, classes, A, B, C)``, logits; sides multiples of
    8. Parameters: 871,922 either norm.
    Errors: UnknownNameError and OptionError for options, InputError for an image's shape.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits, background included.
        norm: norm and activation: ``"batch_norm"`` or ``"inplace_abn"``.
        dropout: share of elements dropped behind every stack layer but a stack's last.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 5,
        norm: str = "batch_norm",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        positive("classes", classes)
        if isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise OptionError(f"dropout must be from 0 to less than 1, got {dropout!r}")
        norm_relu, norm_alone = find_norm_relu(norm), find_norm_alone(norm)
        self.stem = _conv_norm(in_channels, STEM, norm_alone, kernel=5, stride=2)
        self.pooled = nn.Sequential(
            nn.AvgPool3d(3, stride=2, padding=1, count_include_pad=False),
            norm_alone(in_channels, 3),
        )
        self.stacks = nn.ModuleList()
        self.skips = nn.ModuleList()
        self.downs = nn.ModuleList()
        channels = STEM + in_channels
        for layers, growth, skip in zip(LAYERS, GROWTHS, SKIPS, strict=True):
            stack = DenseStack(channels, layers, growth, norm_relu, dropout)
            self.stacks.append(stack)
            self.skips.append(_conv_norm(stack.out_channels, skip, norm_relu))
            if len(self.stacks) < len(LAYERS):
                self.downs.append(_conv_norm(stack.out_channels, STEM, norm_relu, stride=2))
                channels = STEM
        self.head = nn.Conv3d(sum(SKIPS) + in_channels, classes, 3, padding=1)

    @property
    def divisor(self) -> tuple[int, int, int]:
        """What each side of the input must be a multiple of."""
        return DIVISOR

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Names of the dense stacks, in the order in which they run."""
        return tuple(f"stacks.{i}" for i in range(len(self.stacks)))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of ``image``."""
        check_image(image, "DenseVNet", self.in_channels, self.divisor, "A, B, C")
        pooled = self.pooled(image)
        features = torch.cat([self.stem(image), pooled], dim=1)
        half = features.shape[2:]
        skips: list[Tensor] = []
        for level, (stack, skip) in enumerate(zip(self.stacks, self.skips, strict=True)):
            if level > 0:
                features = self.downs[level - 1](features)
            features = stack(features)
            skips.append(_resized(skip(features), half))
        logits = self.head(torch.cat([*skips, pooled], dim=1))
        return _resized(logits, image.shape[2:])


def dense_vnet_divisor(_options: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return what each side must be a multiple of: 8, whatever the options."""
    return DIVISOR


def _conv_norm(
    in_channels: int, out_channels: int, norm: NormAct, kernel: int = 3, stride: int = 1
) -> nn.Sequential:
    conv = nn.Conv3d(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )
    return nn.Sequential(OrderedDict(conv=conv, norm=norm(out_channels, 3)))


def _resized(features: Tensor, sides: torch.Size) -> Tensor:
    if features.shape[2:] == sides:
        return features
    return F.interpolate(features, size=sides, mode="trilinear", align_corners=False)
