"""The blocks of the PocketNet paper: U-Net, ResNet and DenseNet, in 3D and, otherwise, in 2D.

Source: Celaya et al., arXiv:2104.10745, Figure 2. Every convolution has a bias and a ReLU behind
it, in place, which no convolution minds; sums and concatenations are out of place. Each block
starts with a convolution and leaves its input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from memsave.errors import UnknownNameError

__all__ = [
    "BLOCKS_2D",
    "BLOCKS_3D",
    "DenseNetBlock2D",
    "DenseNetBlock3D",
    "ResNetBlock2D",
    "ResNetBlock3D",
    "UNetBlock",
    "conv_relu",
    "find_pocket_block",
    "he_initialise_",
]

Factory = TypeVar("Factory")
_CONV: dict[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


def conv_relu(
    in_channels: int, out_channels: int, kernel: int = 3, *, spatial_dims: int = 3
) -> nn.Sequential:
    """Return a convolution with bias that keeps its input's sides, and its ReLU."""
    conv = _CONV[spatial_dims](in_channels, out_channels, kernel, padding=kernel // 2)
    return nn.Sequential(conv, nn.ReLU(inplace=True))


def he_initialise_(network: nn.Module) -> None:
    """Draw every convolution's weights from He's normal distribution; biases start at 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class UNetBlock(nn.Sequential):
    """Two convolutions i -> o -> o."""

    def __init__(self, in_channels: int, out_channels: int, spatial_dims: int = 3) -> None:
        super().__init__(
            conv_relu(in_channels, out_channels, spatial_dims=spatial_dims),
            conv_relu(out_channels, out_channels, spatial_dims=spatial_dims),
        )


class ResNetBlock3D(nn.Module):
    """Two convolutions i -> o -> o whose results are summed, with no ReLU after the sum."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = conv_relu(in_channels, out_channels)
        self.conv2 = conv_relu(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return y1 + y2, y1 being read by the second convolution."""
        y1: Tensor = self.conv1(x)
        y2: Tensor = self.conv2(y1)
        return y1 + y2


class DenseNetBlock3D(nn.Module):
    """Two convolutions, each reading all before it, then a pointwise one: i -> o."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = conv_relu(in_channels, out_channels)
        self.conv2 = conv_relu(in_channels + out_channels, out_channels)
        self.pointwise = conv_relu(in_channels + 2 * out_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pointwise convolution of [x, y1, y2]."""
        y1 = self.conv1(x)
        y2 = self.conv2(torch.cat([x, y1], dim=1))
        mixed: Tensor = self.pointwise(torch.cat([x, y1, y2], dim=1))
        return mixed


class ResNetBlock2D(nn.Module):
    """Twice x + ReLU(convolution(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv_relu(channels, channels, spatial_dims=2)
        self.conv2 = conv_relu(channels, channels, spatial_dims=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return x and both residuals."""
        x = x + self.conv1(x)
        residual: Tensor = self.conv2(x)
        return x + residual


class DenseNetBlock2D(nn.Module):
    """Two convolutions in a chain, then a pointwise one of [x, y1, y2]: y2 reads y1 only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv_relu(channels, channels, spatial_dims=2)
        self.conv2 = conv_relu(channels, channels, spatial_dims=2)
        self.pointwise = conv_relu(3 * channels, channels, 1, spatial_dims=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pointwise convolution of [x, y1, y2]."""
        y1 = self.conv1(x)
        y2 = self.conv2(y1)
        mixed: Tensor = self.pointwise(torch.cat([x, y1, y2], dim=1))
        return mixed


def _unet_block_2d(channels: int) -> nn.Module:
    return UNetBlock(channels, channels, spatial_dims=2)


# name in a suite file -> block of (in channels, out channels)
BLOCKS_3D: dict[str, Callable[[int, int], nn.Module]] = {
    "unet": UNetBlock,
    "resnet": ResNetBlock3D,
    "densenet": DenseNetBlock3D,
}
# name in a suite file -> block of (channels)
BLOCKS_2D: dict[str, Callable[[int], nn.Module]] = {
    "unet": _unet_block_2d,
    "resnet": ResNetBlock2D,
    "densenet": DenseNetBlock2D,
}


def find_pocket_block(name: str, table: Mapping[str, Factory]) -> Factory:
    """Return the block called ``name`` in ``table``, or raise UnknownNameError with near names."""
    if name not in table:
        raise UnknownNameError("block", name, table)
    return table[name]
