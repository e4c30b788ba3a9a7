"""The bias of a linear layer, added over the product: watched or not.

Where a linear layer's input does not lie dense, as after a transpose, torch makes the product first
and adds the bias over it. Of tensors that Python dispatches it makes another tensor instead, so a
traced step would hold one result more than the same step on a card.

A product and an addition come from one linear layer, and not from a person's own ``x @ w + b``,
where one instruction of Python runs both. Source of the rule: ``linear`` in PyTorch's
aten/src/ATen/native/Linear.cpp.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["LinearLayers"]

_aten = torch.ops.aten
_ADD: Final = _aten.add.Tensor
_ADD_IN_PLACE: Final = _aten.add_.Tensor
_PRODUCTS: Final = frozenset({_aten.mm, _aten.bmm, _aten.mv})
_FRAMES: Final = 6  # torch's own between the dispatch and the caller, and the caller: 3 with 2.13

_Place = tuple[int, tuple[tuple[int, int], ...]]


class LinearLayers:
    """Tells which additions are a linear layer's; must be told of every operator, in order."""

    def __init__(self) -> None:
        self._product: _Place | None = None

    def operator(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Return what the layer would run unwatched: ``func``, or its in-place form."""
        if func is not _ADD or not all(isinstance(arg, Tensor) for arg in args):
            return func
        product, bias = args
        if bias.dim() == 1 < product.dim() and self._product == _made_at(product):
            return _ADD_IN_PLACE
        return func

    def made(self, packet: Any, result: Any) -> None:
        """Note the result of a product."""
        if packet in _PRODUCTS:
            self._product = _made_at(result)


def _made_at(tensor: Tensor) -> _Place:
    """Return the storage of ``tensor``, and which instructions run right now, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "__torch_dispatch__":
        frame = frame.f_back
    running = []
    for _ in range(_FRAMES):
        frame = frame.f_back if frame is not None else None
        if frame is not None:
            running.append((id(frame.f_code), frame.f_lasti))
    return tensor.untyped_storage()._cdata, tuple(running)
