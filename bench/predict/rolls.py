"""``torch.roll`` on CUDA: one side after the other, each into a tensor of its own.

The tensor rolled along the first side is held until the others are done, and so on: over three
sides, as windows of a volume are shifted, the third result stands beside the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["ROLL_CALLS"]

_aten = torch.ops.aten


def _roll(source: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    rank = source.dim()
    if len(shifts) != max(1, len(dims)) or not all(-rank <= d < rank for d in dims):
        refused: Tensor = _aten.roll.default(source, shifts, dims)  # torch says why
        return refused
    return _rolled(source, shifts, dims)


def _rolled(source: Tensor, shifts: Sequence[int], dims: Sequence[int]) -> Tensor:
    if len(dims) <= 1:  # without a side, the tensor is rolled as one long row
        dense = source.contiguous()
        rolled = torch.empty_like(dense, memory_format=torch.contiguous_format)
        del dense
        return rolled
    first = _rolled(source, shifts[:1], dims[:1])
    rolled = _rolled(first, shifts[1:], dims[1:])
    del first
    return rolled


ROLL_CALLS: Final[dict[Any, Callable[..., Any]]] = {_aten.roll: _roll}
