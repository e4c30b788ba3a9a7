"""Convolution blocks i -> m -> o, interchangeable in a network, and the norms they take.

A block is built from convolutions without bias and a ``NormAct``, the factory of what follows
each of them: it alone decides whether the activation or the norm comes first. Every 3-wide
convolution pads by 1, so a block keeps its input's sides.

Source: Wang, Oda, Mori, "Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN"
(arXiv:2003.11117), sections 2.2 and 2.3; bottleneck He et al. 2016, separable Howard et al. 2017.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from memsave.convolution import convolution
from memsave.errors import OptionError, UnknownNameError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.reversible import ReversibleSequence, reversible_conv_block

__all__ = [
    "BLOCKS",
    "NORMS",
    "BlockFactory",
    "Bottleneck",
    "CCBlock",
    "DoubleConv",
    "NormAct",
    "ReversibleStage",
    "SepConv",
    "batch_norm",
    "batch_norm_leaky_relu",
    "find_block",
    "find_norm",
    "group_norm_leaky_relu",
    "in_place_abn_norm",
    "in_place_group_norm",
    "in_place_instance_norm",
    "instance_norm_leaky_relu",
]

REDUCTION = 4  # K of the paper: how far bottleneck and CCBlock reduce their output channels

NormAct = Callable[[int, int], nn.Module]  # (channels, spatial dims) -> activation and norm
# (in, mid, out channels, norm_act, spatial dims) -> block
BlockFactory = Callable[[int, int, int, NormAct, int], nn.Module]
_BATCH_NORM: dict[int, type[nn.Module]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}
_INSTANCE_NORM: dict[int, type[nn.Module]] = {
    1: nn.InstanceNorm1d,
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}
_LEAKY_SLOPE = 0.01  # that of the in-place norms


def batch_norm(channels: int, spatial_dims: int = 3) -> nn.Sequential:
    """In-place ReLU, then BatchNorm: the order of the paper's baseline.

    Memory: keeps the ReLU's output, one activation, beside the result that the next layer keeps.
    """
    return nn.Sequential(nn.ReLU(inplace=True), _BATCH_NORM[spatial_dims](channels))


def batch_norm_leaky_relu(channels: int, spatial_dims: int = 3) -> nn.Sequential:
    """BatchNorm, then in-place leaky ReLU 0.01: what ``in_place_abn_norm`` computes, plainly.

    Memory: keeps BatchNorm's input, one activation, beside the result that the next layer keeps.
    """
    return _then_leaky_relu(_BATCH_NORM[spatial_dims](channels))


def group_norm_leaky_relu(channels: int, spatial_dims: int = 3) -> nn.Sequential:  # noqa: ARG001
    """Group norm, then in-place leaky ReLU 0.01: the plain twin of ``in_place_group_norm``.

    Memory: as ``batch_norm_leaky_relu``.
    """
    return _then_leaky_relu(nn.GroupNorm(math.gcd(8, channels), channels))


def instance_norm_leaky_relu(channels: int, spatial_dims: int = 3) -> nn.Sequential:
    """Instance norm with weights, then in-place leaky ReLU: ``in_place_instance_norm``'s twin.

    Memory: as ``batch_norm_leaky_relu``.
    """
    return _then_leaky_relu(_INSTANCE_NORM[spatial_dims](channels, affine=True))


def _then_leaky_relu(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(norm, nn.LeakyReLU(_LEAKY_SLOPE, inplace=True))


def in_place_abn_norm(channels: int, spatial_dims: int = 3) -> InPlaceABN:  # noqa: ARG001
    """BatchNorm, then leaky ReLU 0.01, over the convolution's output: ``InPlaceABN``.

    Memory: keeps nothing of an activation's size beside the result that the next layer keeps.
    """
    return InPlaceABN(channels)


def in_place_group_norm(channels: int, spatial_dims: int = 3) -> InPlaceGroupNorm:  # noqa: ARG001
    """Group norm of up to 8 groups, then leaky ReLU 0.01, in place: ``InPlaceGroupNorm``.

    The groups are the greatest common divisor of 8 and the channels. Memory: as in-place ABN.
    """
    return InPlaceGroupNorm(math.gcd(8, channels), channels)


def in_place_instance_norm(channels: int, spatial_dims: int = 3) -> InPlaceInstanceNorm:  # noqa: ARG001
    """Instance norm with weights, then leaky ReLU 0.01, in place: ``InPlaceInstanceNorm``.

    Memory: as in-place ABN.
    """
    return InPlaceInstanceNorm(channels, affine=True)


# name in a suite file -> factory of activation and norm
NORMS: dict[str, NormAct] = {
    "batch_norm": batch_norm,
    "batch_norm_leaky_relu": batch_norm_leaky_relu,
    "group_norm_leaky_relu": group_norm_leaky_relu,
    "instance_norm_leaky_relu": instance_norm_leaky_relu,
    "inplace_abn": in_place_abn_norm,
    "inplace_group_norm": in_place_group_norm,
    "inplace_instance_norm": in_place_instance_norm,
}


class DoubleConv(nn.Sequential):
    """Two 3-wide convolutions i -> m -> o, a ``norm_act`` after each: the U-Net's block.

    Shapes: ``(N, i, *)`` to ``(N, o, *)``, ``*`` being ``spatial_dims`` sides; so for all blocks.
    Memory: each convolution keeps its input; ``norm_act`` says what each pair keeps besides.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        norm_act: NormAct,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__(
            OrderedDict(
                conv1=convolution(in_channels, mid_channels, 3, spatial_dims=spatial_dims),
                norm1=norm_act(mid_channels, spatial_dims),
                conv2=convolution(mid_channels, out_channels, 3, spatial_dims=spatial_dims),
                norm2=norm_act(out_channels, spatial_dims),
            )
        )


class Bottleneck(nn.Sequential):
    """1-wide i -> o/4, 3-wide o/4 -> o/4, 1-wide o/4 -> o, a ``norm_act`` after each of the three.

    ``mid_channels`` is not used: the output's channels alone decide the reduced ones.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,  # noqa: ARG002 - one signature for all blocks
        out_channels: int,
        norm_act: NormAct,
        spatial_dims: int = 3,
    ) -> None:
        reduced = _reduced(out_channels)
        super().__init__(
            OrderedDict(
                reduce=convolution(in_channels, reduced, 1, spatial_dims=spatial_dims),
                norm1=norm_act(reduced, spatial_dims),
                conv=convolution(reduced, reduced, 3, spatial_dims=spatial_dims),
                norm2=norm_act(reduced, spatial_dims),
                restore=convolution(reduced, out_channels, 1, spatial_dims=spatial_dims),
                norm3=norm_act(out_channels, spatial_dims),
            )
        )


class SepConv(nn.Sequential):
    """Two separable convolutions i -> m -> o: depthwise 3-wide, pointwise, one ``norm_act``.

    Nothing stands between depthwise and pointwise; the depthwise output is kept for backward.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        norm_act: NormAct,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__(
            OrderedDict(
                depthwise1=_depthwise(in_channels, spatial_dims),
                pointwise1=convolution(in_channels, mid_channels, 1, spatial_dims=spatial_dims),
                norm1=norm_act(mid_channels, spatial_dims),
                depthwise2=_depthwise(mid_channels, spatial_dims),
                pointwise2=convolution(mid_channels, out_channels, 1, spatial_dims=spatial_dims),
                norm2=norm_act(out_channels, spatial_dims),
            )
        )


class CCBlock(nn.Sequential):
    """The paper's compact block: 1-wide i -> o/4, then one separable convolution o/4 -> o.

    A ``norm_act`` follows the 1-wide convolution and the pointwise one. ``mid_channels`` is not
    used: the output's channels alone decide the reduced ones.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,  # noqa: ARG002 - one signature for all blocks
        out_channels: int,
        norm_act: NormAct,
        spatial_dims: int = 3,
    ) -> None:
        reduced = _reduced(out_channels)
        super().__init__(
            OrderedDict(
                reduce=convolution(in_channels, reduced, 1, spatial_dims=spatial_dims),
                norm1=norm_act(reduced, spatial_dims),
                depthwise=_depthwise(reduced, spatial_dims),
                pointwise=convolution(reduced, out_channels, 1, spatial_dims=spatial_dims),
                norm2=norm_act(out_channels, spatial_dims),
            )
        )


class ReversibleStage(nn.Sequential):
    """3-wide convolution i -> o and a ``norm_act``, then one reversible block of o channels.

    The reversible block has a 3-wide convolution, a group norm of up to 8 groups and a leaky ReLU
    on each half; after Brugger et al., MICCAI 2019. ``mid_channels`` is not used.
    Memory: keeps its input, what ``norm_act`` keeps, and its result; nothing of the reversible
        block's insides.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,  # noqa: ARG002 - one signature for all blocks
        out_channels: int,
        norm_act: NormAct,
        spatial_dims: int = 3,
    ) -> None:
        groups = math.gcd(8, out_channels // 2)
        coupling = reversible_conv_block(out_channels, groups, spatial_dims=spatial_dims)
        super().__init__(
            OrderedDict(
                widen=convolution(in_channels, out_channels, 3, spatial_dims=spatial_dims),
                norm=norm_act(out_channels, spatial_dims),
                reversible=ReversibleSequence([coupling]),
            )
        )


# name in a suite file -> block
BLOCKS: dict[str, BlockFactory] = {
    "double_conv": DoubleConv,
    "bottleneck": Bottleneck,
    "sepconv": SepConv,
    "ccblock": CCBlock,
    "reversible": ReversibleStage,
}


def find_block(name: str) -> BlockFactory:
    """Return the block called ``name``, or raise UnknownNameError with near names."""
    if name not in BLOCKS:
        raise UnknownNameError("block", name, BLOCKS)
    return BLOCKS[name]


def find_norm(name: str) -> NormAct:
    """Return the norm called ``name``, or raise UnknownNameError with near names."""
    if name not in NORMS:
        raise UnknownNameError("norm", name, NORMS)
    return NORMS[name]


def _depthwise(channels: int, spatial_dims: int) -> nn.Module:
    return convolution(channels, channels, 3, groups=channels, spatial_dims=spatial_dims)


def _reduced(out_channels: int) -> int:
    if out_channels % REDUCTION:
        raise OptionError(
            f"a block that reduces {REDUCTION}-fold needs output channels that "
            f"{REDUCTION} divides, got {out_channels}"
        )
    return out_channels // REDUCTION
