"""Sampling grids on CUDA: ``affine_grid``, and ``grid_sample`` where cuDNN runs it.

A grid is the product of a base grid, whose points are written side by side, and the transforms; the
base is as large again and a little more, and goes once the product is made. cuDNN samples images of
two dimensions; it takes a copy of a grid that does not lie dense, and no workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

__all__ = ["GRID_CALLS"]

_aten = torch.ops.aten


def _affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    batch, sides = size[0], tuple(size[2:])
    base = _base_grid(theta, size, align_corners)
    grid = _aten.bmm.default(base.view(batch, -1, len(sides) + 1), theta.mT)
    return cast(Tensor, grid.view(batch, *sides, len(sides)))


def _base_grid(like: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    sides = tuple(size[2:])
    base = like.new_empty((size[0], *sides, len(sides) + 1))
    for side in reversed(sides):
        line = like.new_empty((max(side, 1),))
        if not align_corners and side > 1:  # scaled in two steps, away from the corners
            line = line * (side - 1)
            line = line / side
        del line
    return base


def _cudnn_grid_sampler(source: Tensor, grid: Tensor) -> Tensor:
    copies = [_without_zeros(source), grid.contiguous()]
    shape = (source.shape[0], source.shape[1], grid.shape[1], grid.shape[2])
    result = source.new_empty(shape)
    copies.clear()
    return result


def _cudnn_grid_sampler_backward(
    source: Tensor, grid: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    copies = [_without_zeros(source), grid.contiguous(), _without_zeros(gradient)]
    results = source.new_empty(source.shape), grid.new_empty(grid.shape)
    copies.clear()
    return results


def _without_zeros(tensor: Tensor) -> Tensor:
    """Copy what is spread from fewer numbers; cuDNN reads any other."""
    return tensor.contiguous() if 0 in tensor.stride() else tensor


GRID_CALLS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.affine_grid_generator: _affine_grid,
    _aten.cudnn_grid_sampler: _cudnn_grid_sampler,
    _aten.cudnn_grid_sampler_backward: _cudnn_grid_sampler_backward,
}
