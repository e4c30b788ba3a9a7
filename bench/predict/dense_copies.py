"""Copies that CUDA's operators make of operands which do not lie as their kernels read them.

Gradients are spread from one number where a loss is a mean, and lie apart where what was
concatenated is taken apart again; convolutions of other layouts come transposed. Pooling,
upsampling, padding and matrix products copy such an operand once their result is made, and drop
the copy as they end. Which do was seen on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

__all__ = ["dense_copies"]

_aten = torch.ops.aten


def dense_copies(packet: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the sizes in bytes of the copies that an operator on CUDA holds while it runs."""
    found = _READ.get(packet)
    if found is None:
        return ()
    positions, lies_well = found
    operands = [args[place] for place in positions]
    if not all(isinstance(t, Tensor) and t.device.type == "cuda" for t in operands):
        return ()
    return tuple(
        int(t.numel() * t.element_size()) for t in operands if t.numel() and not lies_well(t, args)
    )


def _contiguous(operand: Tensor, _: tuple[Any, ...]) -> bool:
    return operand.is_contiguous()


def _as_first(operand: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether it lies in the first operand's format, which may be channels-last."""
    return operand.is_contiguous(memory_format=suggest_memory_format(args[0]))


def _as_source(operand: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether it lies in the format of the forward's input."""
    return operand.is_contiguous(memory_format=suggest_memory_format(args[1]))


def _matrix(operand: Tensor, _: tuple[Any, ...]) -> bool:
    """Whether cuBLAS can read each matrix by rows or by columns, which may lie apart."""
    (rows, columns), (down, across) = operand.shape[-2:], operand.stride()[-2:]
    by_rows = across == 1 and down >= max(1, columns)
    by_columns = down == 1 and across >= max(1, rows)
    dense = operand.is_contiguous() or operand.transpose(-2, -1).is_contiguous()
    return by_rows or by_columns or dense


_Read = tuple[Sequence[int], Callable[[Tensor, tuple[Any, ...]], bool]]

# Operator -> which operands, in the order of their copies, and how they are read.
_READ: Final[dict[Any, _Read]] = {
    **dict.fromkeys(
        (
            _aten.upsample_nearest3d_backward,
            _aten._upsample_nearest_exact3d_backward,
            _aten.upsample_bicubic2d_backward,
            _aten.avg_pool3d,
            _aten.avg_pool3d_backward,
            _aten.adaptive_max_pool2d,
            _aten.adaptive_max_pool3d,
            _aten.adaptive_max_pool2d_backward,
            _aten.adaptive_max_pool3d_backward,
            _aten.reflection_pad2d,
            _aten.reflection_pad2d_backward,
            _aten.reflection_pad3d,
            _aten.embedding_dense_backward,
            _aten.topk,
            _aten.kthvalue,
        ),
        ((0,), _contiguous),
    ),
    **dict.fromkeys(
        (
            _aten.upsample_nearest2d,
            _aten.upsample_nearest2d_backward,
            _aten._upsample_nearest_exact2d,
            _aten._upsample_nearest_exact2d_backward,
            _aten.max_pool2d_with_indices,
            _aten.max_pool3d_with_indices,
            _aten.avg_pool2d,
        ),
        ((0,), _as_first),
    ),
    _aten.max_pool3d_with_indices_backward: ((0,), _as_source),
    **dict.fromkeys(
        (_aten.max_pool2d_with_indices_backward, _aten.avg_pool2d_backward), ((1, 0), _as_source)
    ),
    **dict.fromkeys((_aten.mm, _aten.bmm), ((0, 1), _matrix)),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm), ((1, 2), _matrix)),
}
