"""The literal table of networks: the name in a suite file -> how to build it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from memsave.errors import UnknownNameError
from memsave.networks.conv_lstm import (
    ConvLSTM,
    ConvLSTMUNet,
    conv_lstm_divisor,
    conv_lstm_unet_divisor,
)
from memsave.networks.dense_vnet import DenseVNet, dense_vnet_divisor
from memsave.networks.fcn import FCN, fcn_divisor
from memsave.networks.light_unet import LightUNet, light_unet_divisor
from memsave.networks.pocket import (
    PocketNet2D,
    PocketNet3D,
    pocketnet_2d_divisor,
    pocketnet_3d_divisor,
    zyx,
)
from memsave.networks.spec import NetworkSpec, Target

__all__ = [
    "FCN",
    "NETWORKS",
    "ConvLSTM",
    "ConvLSTMUNet",
    "DenseVNet",
    "LightUNet",
    "NetworkSpec",
    "PocketNet2D",
    "PocketNet3D",
    "Target",
    "build",
    "check_options",
    "find_network",
]

_C_LSTM = (
    "van de Leemput, Patel, Manniesing: Full Volumetric Brain Tissue Segmentation in "
    "Non-Contrast CT using Memory Efficient Convolutional LSTMs"
)
_FLARE21 = "He, Luo: Fast and Low GPU Memory Abdominal organ segmentation, FLARE 2021"
_POCKETNET = (
    "Celaya et al.: PocketNet: A Smaller Neural Network for 3D Medical Image Segmentation, "
    "arXiv:2104.10745"
)

NETWORKS: dict[str, NetworkSpec] = {
    "fcn": NetworkSpec(
        name="fcn",
        factory=FCN,
        spatial_dims=3,
        divisor=fcn_divisor,
        in_channels=1,
        classes=3,
        summary="3D U-Net with summed skips; compact blocks and in-place ABN by option",
        source="Wang, Oda, Mori: Organ Segmentation From Full-size CT Images Using "
        "Memory-Efficient FCN",
        loss="cross_entropy+dice",
    ),
    "conv_lstm": NetworkSpec(
        name="conv_lstm",
        factory=ConvLSTM,
        spatial_dims=3,
        divisor=conv_lstm_divisor,
        in_channels=1,
        classes=1,
        summary="convolutional LSTM along the slices, a 2D U-Net inside",
        source=_C_LSTM,
        loss="binary_cross_entropy",
        target="mask",
        classes_option="hidden_size",
    ),
    "conv_lstm_unet": NetworkSpec(
        name="conv_lstm_unet",
        factory=ConvLSTMUNet,
        spatial_dims=2,
        divisor=conv_lstm_unet_divisor,
        in_channels=1,
        classes=1,
        summary="the 2D U-Net of conv_lstm alone, as it is trained first",
        source=_C_LSTM,
        loss="binary_cross_entropy",
        target="mask",
        classes_option="hidden_size",
    ),
    "dense_vnet": NetworkSpec(
        name="dense_vnet",
        factory=DenseVNet,
        spatial_dims=3,
        divisor=dense_vnet_divisor,
        in_channels=1,
        classes=5,
        summary="dense stacks at 1/2, 1/4 and 1/8 resolution, read together",
        source=_FLARE21,
        loss="focal",
    ),
    "light_unet": NetworkSpec(
        name="light_unet",
        factory=LightUNet,
        spatial_dims=3,
        divisor=light_unet_divisor,
        in_channels=1,
        classes=2,
        summary="3D U-Net of 8 to 64 channels that finds the abdomen",
        source=_FLARE21,
        loss="focal",
    ),
    "pocketnet_3d": NetworkSpec(
        name="pocketnet_3d",
        factory=PocketNet3D,
        spatial_dims=3,
        divisor=pocketnet_3d_divisor,
        in_channels=1,
        classes=2,
        summary="U-Net, ResNet or DenseNet blocks on a few slices, full or pocket widths",
        source=_POCKETNET,
        loss="l2_dice",
        input_sides=zyx,
    ),
    "pocketnet_2d": NetworkSpec(
        name="pocketnet_2d",
        factory=PocketNet2D,
        spatial_dims=2,
        divisor=pocketnet_2d_divisor,
        in_channels=1,
        classes=1,
        summary="nested levels of U-Net, ResNet or DenseNet blocks, full or pocket widths",
        source=_POCKETNET,
        loss="l2_dice",
        target="mask",
    ),
}


def find_network(name: str) -> NetworkSpec:
    """Return the network called ``name``, or raise UnknownNameError with near names."""
    if name not in NETWORKS:
        raise UnknownNameError("network", name, NETWORKS)
    return NETWORKS[name]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise UnknownNameError if network ``name`` has no option that ``options`` names."""
    known = inspect.signature(find_network(name).factory).parameters
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of network {name!r}", option, known)


def build(name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the network called ``name``, with the options that a suite gives it.

    Raises UnknownNameError or OptionError, naming the network or option and what is wrong.
    """
    check_options(name, options or {})
    return find_network(name).factory(**(options or {}))
