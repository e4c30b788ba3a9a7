"""What a layer of norm and activation computes, read off the module."""

from __future__ import annotations

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
from memsave.recompute_pairs import _Elsewhere as Elsewhere
from memsave.recomputed_norm_act import RecomputedNormAct

__all__ = ["NormRule", "norm_rule"]

_Activation = Literal["relu", "leaky_relu", "elu", "identity"]


@dataclass(frozen=True, slots=True)
class NormRule:
    """A norm and the activation before or behind it."""

    norm: nn.Module  # holds weight, bias and, for batch norm, the running statistics
    activation: _Activation
    parameter: float  # the leaky ReLU's slope, ELU's alpha
    activation_first: bool
    in_place: bool  # the scale is |weight| + eps, as the in-place norms have it
    groups: int | None  # None: the statistics are the batch's; else a sample's, in that many groups

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return float(self.norm.eps)  # type: ignore[arg-type]

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
        running = getattr(self.norm, "running_mean", None)
        return self.groups is None and not self.norm.training and running is not None

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


def norm_rule(layer: nn.Module) -> NormRule:
    """Return what ``layer`` computes, or raise RefusedError if it cannot run slab by slab."""
    if isinstance(layer, InPlaceABN | InPlaceGroupNorm | InPlaceInstanceNorm) and not isinstance(
        layer, InPlaceABNSync
    ):
        kind: _Activation = layer.activation
        return NormRule(
            layer, kind, float(layer.activation_param), False, True, _groups(layer, layer)
        )
    layer = _without_place_holder(layer)
    if isinstance(layer, RecomputedNormAct):
        pair, first = (layer.norm, layer.activation), layer.order == "act_norm"
    elif isinstance(layer, nn.Sequential) and len(layer) == 2:
        first = not _is_norm(layer[0])
        pair = (layer[1], layer[0]) if first else (layer[0], layer[1])
    else:
        raise _refused(layer, layer)
    norm, activation = pair
    if not _is_norm(norm):
        raise _refused(norm, layer)
    name, parameter = _activation(activation, layer)
    return NormRule(norm, name, parameter, first, False, _groups(norm, layer))


def _without_place_holder(layer: nn.Module) -> nn.Module:
    """Return the pair that ``recompute_pairs`` put into a sequence of norm and activation."""
    children = list(layer.children()) if isinstance(layer, nn.Sequential) else []
    pairs = [child for child in children if isinstance(child, RecomputedNormAct)]
    rest = [child for child in children if not isinstance(child, RecomputedNormAct | Elsewhere)]
    return pairs[0] if len(pairs) == 1 and not rest else layer


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.SyncBatchNorm):
        return False  # its statistics are other processes' too
    return isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm)


def _groups(norm: nn.Module, layer: nn.Module) -> int | None:
    if isinstance(norm, _InstanceNorm) and norm.track_running_stats:
        raise _refused(norm, layer)
    if isinstance(norm, _InstanceNorm | InPlaceInstanceNorm):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm | InPlaceGroupNorm):
        return norm.num_groups
    return None


def _activation(module: nn.Module, layer: nn.Module) -> tuple[_Activation, float]:
    if isinstance(module, nn.ReLU):
        return "relu", 0.0
    if isinstance(module, nn.LeakyReLU):
        return "leaky_relu", float(module.negative_slope)
    if isinstance(module, nn.ELU):
        return "elu", float(module.alpha)
    if isinstance(module, nn.Identity):
        return "identity", 0.0
    raise _refused(module, layer)


def _refused(module: nn.Module, layer: nn.Module) -> RefusedError:
    return RefusedError(
        f"{type(module).__name__} in {type(layer).__name__} cannot run slab by slab: take a batch, "
        "group or instance norm of one process, and ReLU, leaky ReLU, ELU or no activation"
    )
