"""Layer norm on CUDA, forward and backward: what it takes beside its results, in its order.

What does not lie dense is copied before the results are made, and the copies go as the operator
ends. Where very many rows are normalised over few numbers, backward adds up the gradients of weight
and bias in two passes: blocks of rows leave their sums in a tensor of ``partial_rows`` rows, whose
sum then replaces the gradient that was made first. As torch 2.11 and 2.13 do it.
"""

# ruff: noqa: ARG001 - the signatures are the operators'

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod
from typing import Any, Final

import torch
from torch import Tensor

from bench.predict.traced_card import multiprocessors

__all__ = ["LAYER_NORM_CALLS", "partial_rows"]

_aten = torch.ops.aten
_HALF: Final = (torch.float16, torch.bfloat16)
_LANES: Final = 32  # numbers of a row that a block of threads takes, and rows of a block's sum
_MANY_ROWS: Final = 64 * 1024
_MOST_BLOCKS: Final = 32 * 1024


def partial_rows(rows: int, width: int) -> int:
    """Return how many rows of sums backward holds for weight and for bias; 0 with one pass.

    ``rows`` are normalised, each over ``width`` numbers. Two passes are taken where the width alone
    would leave half of the card's multiprocessors without work.
    """
    if rows <= _MANY_ROWS or width // _LANES >= multiprocessors() // 2:
        return 0
    return min(ceil(rows / _LANES), _MOST_BLOCKS // ceil(width / _LANES))


def _layer_norm(
    source: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(normalized_shape)
    parts = [t for t in (weight, bias) if t is not None]
    if tuple(source.shape[-len(shape) :]) != shape or any(t.shape != shape for t in parts):
        refused: tuple[Tensor, Tensor, Tensor] = _aten.native_layer_norm.default(
            source, normalized_shape, weight, bias, epsilon
        )  # torch says why
        return refused
    copies = [_dense(t) for t in (source, weight, bias)]
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    rows = (*source.shape[: -len(shape)], *[1] * len(shape))
    wide = torch.float32 if source.dtype in _HALF else source.dtype
    mean, scale = (source.new_empty(rows, dtype=wide) for _ in range(2))
    copies.clear()
    return out, mean, scale


def _layer_norm_backward(
    gradient: Tensor,
    source: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    copies = [_dense(t) for t in (source, weight, bias)]
    of_source = _like(source) if wanted[0] else None
    of_others = [
        _like(t) if t is not None and one else None
        for t, one in zip((weight, bias), wanted[1:], strict=True)
    ]
    copies.append(gradient.contiguous())
    width = prod(normalized_shape)
    rows = partial_rows(source.numel() // width, width) if width else 0
    if rows:
        _sum_in_two_passes(of_others, rows)
    copies.clear()
    return of_source, *of_others


def _sum_in_two_passes(gradients: list[Tensor | None], rows: int) -> None:
    """Replace each gradient by the sum of its parts; all parts are held until both are summed."""
    parts = [None if t is None else t.new_empty((rows, t.numel())) for t in gradients]
    for place, part in enumerate(parts):
        gradient = gradients[place]
        if part is not None and gradient is not None:
            shape = gradient.shape
            gradients[place] = part.sum(0).view(shape)
        del part, gradient


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


LAYER_NORM_CALLS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.native_layer_norm: _layer_norm,
    _aten.native_layer_norm_backward: _layer_norm_backward,
}
