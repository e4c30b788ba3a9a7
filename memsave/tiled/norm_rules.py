"""What a layer of norm and activation computes, read off the module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from memsave.errors import RefusedError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_abn_sync import InPlaceABNSync
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.recomputed_norm_act import RecomputedNormAct
from memsave.surgery.stand_ins import _RestingWhenMarked as RestingWhenMarked

__all__ = ["NormRule", "joined_rule"]

_Activation = Literal["relu", "leaky_relu", "elu", "identity"]


@dataclass(frozen=True, slots=True)
class NormRule:
    """A norm and the activation before or behind it; either may be missing."""

    norm: nn.Module | None  # holds weight, bias and, for batch norm, the running statistics
    activation: _Activation
    parameter: float  # the leaky ReLU's slope, ELU's alpha
    activation_first: bool
    in_place: bool  # the scale is |weight| + eps, as the in-place norms have it
    groups: int | None  # None: the statistics are the batch's; else a sample's, in that many groups

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return float(self.norm.eps)  # type: ignore[union-attr,arg-type]

    @property
    def weight(self) -> nn.Parameter | None:
        """The norm's weight."""
        return getattr(self.norm, "weight", None)

    @property
    def bias(self) -> nn.Parameter | None:
        """The norm's bias."""
        return getattr(self.norm, "bias", None)

    def uses_running_statistics(self) -> bool:
        """Whether this forward takes the running statistics instead of the batch's."""
        if self.norm is None:
            return False
        running = getattr(self.norm, "running_mean", None)
        return self.groups is None and not self.norm.training and running is not None

    def needs_statistics(self) -> bool:
        """Whether a pass over all slabs must come before any slab's result."""
        return self.norm is not None and not self.uses_running_statistics()

    def activate_(self, y: Tensor) -> Tensor:
        """Overwrite ``y`` with its activation."""
        if self.activation == "relu":
            return torch.relu_(y)
        if self.activation == "leaky_relu":
            return torch.nn.functional.leaky_relu_(y, self.parameter)
        if self.activation == "elu":
            return torch.nn.functional.elu_(y, self.parameter)
        return y

    def activation_gradient(self, gradient: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of what was activated, ``y``."""
        aten = torch.ops.aten
        if self.activation == "relu":
            result: Tensor = aten.threshold_backward(gradient, y, 0)
        elif self.activation == "leaky_relu":
            result = aten.leaky_relu_backward(gradient, y, self.parameter, False)
        elif self.activation == "elu":
            result = aten.elu_backward(gradient, self.parameter, 1, 1, False, y)
        else:
            result = gradient
        return result


def joined_rule(layers: Sequence[nn.Module], where: str) -> NormRule:
    """Return what ``layers``, at most a norm and an activation, compute one after the other.

    Raises RefusedError if that cannot run slab by slab; ``where`` says in whose name.
    """
    layers = _without_resting(layers)
    if len(layers) == 1 and isinstance(
        layer := layers[0], InPlaceABN | InPlaceGroupNorm | InPlaceInstanceNorm
    ):
        if isinstance(layer, InPlaceABNSync):
            raise _refused(layer, where)
        kind: _Activation = layer.activation
        groups = _groups(layer, where)
        return NormRule(layer, kind, float(layer.activation_param), False, True, groups)
    if len(layers) == 1 and isinstance(layer := layers[0], RecomputedNormAct):
        first, pair = layer.order == "act_norm", (layer.norm, layer.activation)
        return _rule_of_pair(*pair, first, where)
    if len(layers) > 2:
        names = ", ".join(type(layer).__name__ for layer in layers)
        raise RefusedError(
            f"{names} in {where} cannot run slab by slab: between two convolutions stand at most "
            "a norm and an activation"
        )
    first = len(layers) == 2 and _is_norm(layers[1])
    norms = [layer for layer in layers if _is_norm(layer)]
    others = [layer for layer in layers if not _is_norm(layer)]
    if len(norms) > 1 or len(others) > 1:
        raise _refused(layers[0], where)
    return _rule_of_pair(next(iter(norms), None), next(iter(others), None), first, where)


def _rule_of_pair(
    norm: nn.Module | None, activation: nn.Module | None, first: bool, where: str
) -> NormRule:
    if norm is not None and not _is_norm(norm):
        raise _refused(norm, where)
    name, parameter = _activation(activation, where)
    groups = None if norm is None else _groups(norm, where)
    return NormRule(norm, name, parameter, first, False, groups)


def _without_resting(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Leave out an activation that rests because the layer before it has applied it."""
    fused = (InPlaceABN, InPlaceGroupNorm, InPlaceInstanceNorm, RecomputedNormAct)
    return [
        layer
        for before, layer in zip([None, *layers], layers, strict=False)
        if not (isinstance(layer, RestingWhenMarked) and isinstance(before, fused))
    ]


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.SyncBatchNorm):
        return False  # its statistics are other processes' too
    return isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm)


def _groups(norm: nn.Module, where: str) -> int | None:
    if isinstance(norm, _InstanceNorm) and norm.track_running_stats:
        raise _refused(norm, where)
    if isinstance(norm, _InstanceNorm | InPlaceInstanceNorm):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm | InPlaceGroupNorm):
        return norm.num_groups
    return None


def _activation(module: nn.Module | None, where: str) -> tuple[_Activation, float]:
    if module is None:
        return "identity", 0.0
    if isinstance(module, nn.ReLU):
        return "relu", 0.0
    if isinstance(module, nn.LeakyReLU):
        return "leaky_relu", float(module.negative_slope)
    if isinstance(module, nn.ELU):
        return "elu", float(module.alpha)
    raise _refused(module, where)


def _refused(module: nn.Module, where: str) -> RefusedError:
    return RefusedError(
        f"{type(module).__name__} in {where} cannot run slab by slab: take a batch, "
        "group or instance norm of one process, or none, and ReLU, leaky ReLU, ELU or no activation"
    )
