"""Modules in place of others: a norm that applies its activation, an activation that then rests.

A module's class changes, the object stays: parameters, buffers, state-dict keys, every reference
to it and an optimizer made before remain what they were. Where one activation serves several
places, the fused norm marks its result, and the activation lets marked tensors through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memsave.in_place_abn import InPlaceABN
from memsave.in_place_abn_maths import Activation
from memsave.in_place_abn_sync import InPlaceABNSync
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm

__all__ = [
    "IN_PLACE_CLASSES",
    "Snapshot",
    "make_in_place",
    "mark_results",
    "rest_always",
    "rest_functions",
    "rest_when_marked",
]

# A norm of torch's -> what takes its place, the object and its parameters staying
IN_PLACE_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: InPlaceABN,
    nn.BatchNorm2d: InPlaceABN,
    nn.BatchNorm3d: InPlaceABN,
    nn.SyncBatchNorm: InPlaceABNSync,
    nn.GroupNorm: InPlaceGroupNorm,
    nn.InstanceNorm1d: InPlaceInstanceNorm,
    nn.InstanceNorm2d: InPlaceInstanceNorm,
    nn.InstanceNorm3d: InPlaceInstanceNorm,
}
_MARK = "_memsave_activated"


def make_in_place(norm: nn.Module, activation: Activation, parameter: float) -> None:
    """Turn ``norm`` into the in-place norm of its kind, with this activation."""
    kind = IN_PLACE_CLASSES[type(norm)]
    if isinstance(norm, nn.GroupNorm):
        norm.__dict__.update(_groups=norm.num_groups, _channels=norm.num_channels)
    elif isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        norm.__dict__.update(_groups=norm.num_features, _channels=norm.num_features)
    norm.__dict__.update(activation=activation, activation_param=parameter)
    norm.__class__ = kind


def rest_always(activation: nn.Module) -> None:
    """Let ``activation`` return its input: all its callers have had it applied already."""
    _become(activation, _Resting)


def rest_when_marked(activation: nn.Module) -> None:
    """Let ``activation`` return its input where a fused norm made it, and work elsewhere."""
    _become(activation, _RestingWhenMarked)


def rest_functions(owner: nn.Module) -> None:
    """Let the activation functions in ``owner``'s forward return what a fused norm made."""
    _become(owner, _RestingFunctions)


def mark_results(norm: nn.Module) -> None:
    """Let a fused ``norm`` mark its results, for an activation that rests when it sees the mark."""
    _become(norm, _Marking)


class Snapshot:
    """What the modules of a model are, so that a change half made can be taken back."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, type(module), dict(module.__dict__), _registries(module))
            for module in model.modules()
        ]

    def restore(self) -> None:
        """Make every module what it was: class, attributes, children, parameters and hooks."""
        for module, kind, attributes, registries in self._modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for registry, contents in registries:
                registry.clear()
                registry.update(contents)


def _registries(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the dicts and sets that ``nn.Module`` changes in place, each with a copy."""
    own = (module.__dict__.get(name) for name in vars(nn.Module()))
    return [(value, value.copy()) for value in own if isinstance(value, dict | set)]


def _become(module: nn.Module, part: type[nn.Module]) -> None:
    if not isinstance(module, part):
        module.__class__ = _combined(part, type(module))  # type: ignore[arg-type]


@functools.cache
def _combined(part: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    name = plain.__name__
    if part is not _RestingFunctions:  # whose module computes all that it did
        name = part.__name__.strip("_") + name
    return type(name, (part, plain), {"__doc__": plain.__doc__})


def _restore(part: type[nn.Module], plain: type[nn.Module]) -> nn.Module:
    made: type[nn.Module] = _combined(part, plain)  # type: ignore[arg-type]
    return made.__new__(made)


class _StandIn(nn.Module):
    """The part of a class made at run time that is ours."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Such a class has no name to be found by: a pickle or a deep copy makes it again.
        part, plain = type(self).__bases__
        return _restore, (part, plain), self.__dict__.copy()


class _Resting(_StandIn):
    def forward(self, input: Any) -> Any:
        return input


class _RestingWhenMarked(_StandIn):
    def forward(self, input: Any) -> Any:
        return input if _take_mark(input) else super().forward(input)


class _Marking(_StandIn):
    def forward(self, x: Any) -> Any:
        z = super().forward(x)
        setattr(z, _MARK, True)
        return z


class _RestingFunctions(_StandIn):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _LeaveOut():
            return super().forward(*args, **kwargs)


class _LeaveOut(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            x = args[0] if args else kwargs.get("input")
            if _take_mark(x):
                return x
        return func(*args, **kwargs)


_FUNCTIONS: set[Callable[..., Any]] = {
    F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu,
    F.leaky_relu_, F.elu, F.elu_, F.silu, F.gelu, F.mish, F.prelu, torch.prelu, Tensor.prelu,
    F.selu, F.selu_, F.celu, F.celu_, F.relu6, F.hardswish, F.softplus, F.sigmoid, torch.sigmoid,
    Tensor.sigmoid, F.tanh, torch.tanh, Tensor.tanh,
}  # fmt: skip


def _take_mark(x: Any) -> bool:
    """Whether ``x`` carries a mark, which is gone afterwards: it stands for one application."""
    if not (isinstance(x, Tensor) and getattr(x, _MARK, False)):
        return False
    setattr(x, _MARK, False)  # no delattr: torch.compile cannot follow it
    return True
