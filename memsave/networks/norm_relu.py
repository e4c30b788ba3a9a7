"""BatchNorm, then activation: the order of these networks, unlike the FCN's, by a norm's name.

A suite's ``norm: batch_norm`` is BatchNorm and ReLU; ``norm: inplace_abn`` is in-place ABN, whose
activation is leaky ReLU 0.01, since backward could not invert a ReLU.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from memsave.blocks import NormAct
from memsave.errors import UnknownNameError
from memsave.in_place_abn import InPlaceABN

__all__ = ["NORM_ACTIVATIONS", "find_norm_alone", "find_norm_relu"]

_BATCH_NORM: dict[int, type[nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _batch_norm_relu(channels: int, spatial_dims: int = 3) -> nn.Module:
    return nn.Sequential(_BATCH_NORM[spatial_dims](channels), nn.ReLU(inplace=True))


def _in_place_abn(channels: int, spatial_dims: int = 3) -> nn.Module:  # noqa: ARG001
    return InPlaceABN(channels)


def _batch_norm_alone(channels: int, spatial_dims: int = 3) -> nn.Module:
    return _BATCH_NORM[spatial_dims](channels)


def _in_place_alone(channels: int, spatial_dims: int = 3) -> nn.Module:  # noqa: ARG001
    return InPlaceABN(channels, activation="identity")


# name in a suite file -> (norm and activation, the same norm without the activation)
NORM_ACTIVATIONS: dict[str, tuple[NormAct, NormAct]] = {
    "batch_norm": (_batch_norm_relu, _batch_norm_alone),
    "inplace_abn": (_in_place_abn, _in_place_alone),
}


def find_norm_relu(name: str) -> NormAct:
    """Return the factory of norm and activation called ``name``, or raise UnknownNameError.

    Memory: ``batch_norm`` keeps its input and the ReLU's result, two activations;
        ``inplace_abn`` the result alone, which the next convolution keeps anyway.
    """
    return _find(name)[0]


def find_norm_alone(name: str) -> Callable[[int, int], nn.Module]:
    """Return the factory of the same norm with no activation behind it."""
    return _find(name)[1]


def _find(name: str) -> tuple[NormAct, NormAct]:
    if name not in NORM_ACTIVATIONS:
        raise UnknownNameError("norm", name, NORM_ACTIVATIONS)
    return NORM_ACTIVATIONS[name]
