"""Upsampling on CUDA: how results lie, and what is copied.

Linear results lie as their input does, channels last too, with however few channels: torch's own
stand-ins for tensors without values say otherwise below 16. In three dimensions the kernels know
dense tensors alone: what lies otherwise, results too, is worked on in a dense copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

__all__ = ["UPSAMPLING_CALLS"]

_aten = torch.ops.aten


def _linear(packet: Any, source: Tensor, *others: Any, **named: Any) -> Tensor:
    without_values = source.new_empty(source.shape, device="meta")
    return _lying_as(source, packet(without_values, *others, **named).shape)


def _linear_backward(packet: Any, gradient: Tensor, *others: Any, **named: Any) -> Tensor:
    without_values = gradient.new_empty(gradient.shape, device="meta")
    result = _lying_as(gradient, packet(without_values, *others, **named).shape)
    if gradient.dim() == 5:
        copies = [gradient.contiguous(), result.contiguous()]
    else:
        copies = [gradient.contiguous(memory_format=suggest_memory_format(gradient))]
    copies.clear()
    return result


def _nearest(packet: Any, source: Tensor, *others: Any, **named: Any) -> Tensor:
    result: Tensor = packet(source, *others, **named)
    dense = result if result.is_contiguous() else result.new_empty(result.shape)
    copy = source.contiguous()
    del copy, dense
    return result


def _lying_as(tensor: Tensor, shape: torch.Size) -> Tensor:
    like = suggest_memory_format(tensor)
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=like)


UPSAMPLING_CALLS: Final[dict[Any, Callable[..., Any]]] = {
    packet: partial(call, packet)
    for call, packets in {
        _linear: (_aten.upsample_bilinear2d, _aten.upsample_trilinear3d),
        _linear_backward: (
            _aten.upsample_bilinear2d_backward,
            _aten.upsample_trilinear3d_backward,
        ),
        _nearest: (_aten.upsample_nearest3d, _aten._upsample_nearest_exact3d),
    }.items()
    for packet in packets
}
