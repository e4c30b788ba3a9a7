"""``unfold``, ``fold`` and ``cdist`` on CUDA: what they take beside their results, in their order.

``unfold`` and ``fold`` begin with a tensor as large as their input and make it as large as the
result: so a result that is smaller than the input keeps the input's size, as the gradient of
``unfold`` does. The matrix form of ``cdist`` joins each point with its square and a one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["UNFOLDING_CALLS"]

_aten = torch.ops.aten


def _im2col(source: Tensor, *sides: Sequence[int]) -> Tensor:
    return _resized(_aten.im2col.default, source, sides)


def _col2im(source: Tensor, *sides: Sequence[int]) -> Tensor:
    return _resized(_aten.col2im.default, source, sides)


def _resized(operator: Any, source: Tensor, sides: tuple[Sequence[int], ...]) -> Tensor:
    shape = operator(source.new_empty(source.shape, device="meta"), *sides).shape
    result = torch.empty_like(source)
    dense = source.contiguous()
    result.resize_(shape)
    del dense
    return result


def _euclidean_distances(first: Tensor, second: Tensor) -> Tensor:
    squares, ones = _squares(first)
    others, others_ones = _squares(second)
    rows = torch.cat([first.mul(-2), squares, ones], -1)
    columns = torch.cat([second, others_ones, others], -1)
    product = _aten.mm.default if rows.dim() == 2 else _aten.bmm.default
    distances: Tensor = product(rows, columns.mT)
    return distances


def _squares(points: Tensor) -> tuple[Tensor, Tensor]:
    squares = points.pow(2).sum(-1, keepdim=True)
    return squares, torch.ones_like(squares)


UNFOLDING_CALLS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.im2col: _im2col,
    _aten.col2im: _col2im,
    _aten._euclidean_dist: _euclidean_distances,
}
