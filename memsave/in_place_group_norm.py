"""Group and instance norm with their activation, written over their input.

Source: the maths of in-place ABN (Rota Bulo et al., CVPR 2018, arXiv:1712.02616) with the
statistics of Wu and He, "Group Normalization", ECCV 2018, arXiv:1803.08494, and of Ulyanov et
al., "Instance Normalization", 2016, arXiv:1607.08022. How backward works is told in
``memsave/in_place_norm.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memsave.errors import InputError, OptionError
from memsave.in_place_abn_maths import Activation
from memsave.in_place_norm import (
    check_activation,
    check_input,
    run_in_place_norm,
    take_keys_of_pair,
)

__all__ = ["InPlaceGroupNorm", "InPlaceInstanceNorm", "in_place_group_norm"]


def in_place_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: Activation = "leaky_relu",
    activation_param: float = 0.01,
) -> Tensor:
    """Group norm, then activation, of ``x``, written over ``x`` and, in backward, over the result.

    Computes ``act((|weight| + eps) * (x - mean) / sqrt(var + eps) + bias)`` with the mean and
    biased variance of each sample's groups of channels; as many groups as channels is instance
    norm. Statistics are the sample's in evaluation too.

    Shapes: ``x`` and result ``(N, C, *)``, any number of sides, floating point, one storage;
        ``weight`` and ``bias`` ``(C,)``, of a wider type than ``x`` if wanted.
    Memory: keeps z, ``x.nbytes`` bytes, which the next layer keeps anyway, and 1/std, ``N * G``
        numbers; group norm and activation keep ``x.nbytes`` more. On CUDA no temporary of an
        activation's size, as in ``in_place_abn``; the plain maths has temporaries as there, for a
        group larger than one of them too, which then takes two, and in forward one such where
        values do not lie densely as the statistics' type: half precision, slices.
    Exact: within the bounds of ``in_place_abn``, whose inversion it shares.
    Errors: InputError if ``x`` is not floating point, has the wrong channels or but one value a
        group, is expanded, or is a leaf that requires grad, and where ``x`` itself is used
        afterwards; OptionError if the groups do not divide the channels. In backward, and
        unchecked, as ``in_place_abn``.
    """
    return _run("in-place group norm", x, num_groups, weight, bias, eps, activation,
                activation_param)  # fmt: skip


class _InPlaceSampleNorm(nn.Module):
    """What both layers are: statistics of each sample, weight and bias of each channel."""

    _name: str

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float,
        affine: bool,
        activation: Activation,
        activation_param: float,
    ) -> None:
        super().__init__()
        check_activation(self._name, activation, activation_param)
        _check_groups(num_groups, num_channels)
        self._groups, self._channels = num_groups, num_channels
        self.eps, self.affine = eps, affine
        self.activation, self.activation_param = activation, activation_param
        self.weight = nn.Parameter(torch.ones(num_channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm and activation of ``x``, which is overwritten."""
        if x.dim() > 1 and x.shape[1] != self._channels:
            raise InputError(
                f"{self._name} has {self._channels} channels, "
                f"got an input with {x.shape[1]}: shape {tuple(x.shape)}"
            )
        return _run(
            self._name, x, self._groups, self.weight, self.bias, self.eps,
            self.activation, self.activation_param,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        take_keys_of_pair(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _options(self) -> str:
        return (
            f"eps={self.eps}, affine={self.affine}, "
            f"activation={self.activation}[{self.activation_param}]"
        )


class InPlaceGroupNorm(_InPlaceSampleNorm):
    """Group norm with its activation, over its input: ``in_place_group_norm`` as a layer.

    Takes the place of ``nn.Sequential(GroupNorm(groups, n), LeakyReLU(0.01))`` after a
    convolution. Its state dict is ``nn.GroupNorm``'s, so that either loads the other's, and it
    loads that of such a pair; but a negative weight acts as its absolute value here.

    Args:
        num_groups: groups, which divide the channels.
        num_channels: channels.
        eps: added to the variance, and to ``|weight|``.
        affine: whether there are weight and bias.
        activation: ``"leaky_relu"``, ``"elu"`` or ``"identity"`` (ReLU cannot be inverted).
        activation_param: slope of leaky ReLU, alpha of ELU; more than 0.
    """

    _name = "in-place group norm"

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: Activation = "leaky_relu",
        activation_param: float = 0.01,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, activation, activation_param)
        self.num_groups, self.num_channels = num_groups, num_channels

    def extra_repr(self) -> str:
        """Return the options."""
        return f"{self.num_groups}, {self.num_channels}, {self._options()}"


class InPlaceInstanceNorm(_InPlaceSampleNorm):
    """Instance norm with its activation, over its input: a group for each channel.

    Takes the place of ``nn.Sequential(InstanceNorm3d(n, affine=...), LeakyReLU(0.01))`` after a
    convolution, with 1D, 2D or 3D input; ``affine`` is off unless asked for, as there. There are
    no running statistics. Its state dict is ``nn.InstanceNorm3d``'s without them, and it loads that
    of such a pair.

    Args:
        num_features: channels.
        eps: added to the variance, and to ``|weight|``.
        affine: whether there are weight and bias.
        activation: ``"leaky_relu"``, ``"elu"`` or ``"identity"`` (ReLU cannot be inverted).
        activation_param: slope of leaky ReLU, alpha of ELU; more than 0.
    """

    _name = "in-place instance norm"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = False,
        activation: Activation = "leaky_relu",
        activation_param: float = 0.01,
    ) -> None:
        super().__init__(num_features, num_features, eps, affine, activation, activation_param)
        self.num_features = num_features

    def extra_repr(self) -> str:
        """Return the options."""
        return f"{self.num_features}, {self._options()}"


def _run(
    name: str,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation,
    param: float,
) -> Tensor:
    check_activation(name, activation, param)
    check_input(name, x, weight=weight, bias=bias)
    _check_groups(groups, x.shape[1])
    values = x[:1].numel() // groups
    if x.shape[0] and values <= 1:
        raise InputError(
            f"{name} needs more than one value per group, got {values}: "
            f"{groups} groups, an input of shape {tuple(x.shape)}"
        )
    return run_in_place_norm(
        x, weight, bias, None, None, groups, False, 0.0, eps, activation, param
    )


def _check_groups(groups: int, channels: int) -> None:
    if groups < 1 or channels % groups:
        raise OptionError(f"{groups} groups do not divide {channels} channels")
