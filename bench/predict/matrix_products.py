"""Workspaces that matrix products take with their first call: cuBLAS's, and cuBLASLt's.

Each of a step's two threads has handles of its own, and with each a workspace that is kept. Which
products go to cuBLASLt, and whether it has a workspace beside cuBLAS's, depends on the torch that
is installed: seen on torch 2.11 and 2.13, and 2.12 is taken to be as 2.13. A product without
numbers calls neither.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from torch import Tensor

__all__ = ["LT_WORKSPACE_BYTES", "MatrixProducts"]

LT_WORKSPACE_BYTES: Final = 1 << 20
"""cuBLASLt's workspace where it has its own, on every card; torch 2.11's default."""

_aten = torch.ops.aten
_SHARED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
_LT_TYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WITH_BIAS: Final = frozenset({_aten.addmm, _aten._addmm_activation})
# Operator -> where its arguments say what is multiplied.
_FACTORS: Final = {
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.mv, _aten.dot, _aten.vdot), (0, 1)),
    **dict.fromkeys(
        (
            *(_aten.addmm, _aten.addmm_, _aten._addmm_activation),
            *(_aten.baddbmm, _aten.baddbmm_, _aten.addbmm, _aten.addbmm_),
            *(_aten.addmv, _aten.addmv_),
        ),
        (1, 2),
    ),
}

_Workspace = Literal["cublas", "cublaslt"]


class MatrixProducts:
    """The workspaces that a step's matrix products have taken so far."""

    def __init__(self) -> None:
        self._taken: set[tuple[bool, _Workspace]] = set()

    def first_calls(
        self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[_Workspace]:
        """Return whose workspaces this operator is the first to ask for, in their order.

        Autograd runs what is on a GPU in a thread for that GPU, recomputation included.
        """
        places = _FACTORS.get(packet)
        if places is None or not all(args[place].numel() for place in places):
            return []
        if packet is _aten.bmm and _is_outer(args[0], kwargs):
            return []
        in_backward = torch._C._current_graph_task_id() != -1
        asked: list[_Workspace] = ["cublas"]
        if not _SHARED and packet in _WITH_BIAS and _goes_to_lt(args[0], args[2], kwargs):
            asked.append("cublaslt")
        first = [one for one in asked if (in_backward, one) not in self._taken]
        self._taken.update((in_backward, one) for one in first)
        return first


def _is_outer(first: Tensor, kwargs: dict[str, Any]) -> bool:
    """Each row's one number times a row: torch 2.13 multiplies such by itself."""
    return _SHARED and first.shape[2] == 1 and not first.is_complex() and "out" not in kwargs


def _goes_to_lt(bias: Tensor, second: Tensor, kwargs: dict[str, Any]) -> bool:
    """A linear layer's does: a row added as it is to each row of a product of matrices."""
    row = bias.dim() == 1 or (bias.dim() == 2 and bias.shape[0] == 1)
    if not row or bias.shape[-1] != second.shape[1] or kwargs.get("beta", 1) != 1:
        return False
    return bias.dtype in _LT_TYPES and bias.is_contiguous() and min(second.shape) > 1
