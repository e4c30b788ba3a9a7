"""What operators take inside, beside their results, by torch's own CUDA code; cards do not matter.

These are exact: the operators' code on the host allocates so, whatever card is below. What cuDNN,
cuBLAS and a kernel's own tuning take depends on the card, see ``bench.predict.workspaces``. Small
buffers of reductions that many blocks share (some KiB) are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["hidden_bytes"]

_aten = torch.ops.aten


def hidden_bytes(packet: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the bytes that an operator holds while it runs, taken after its result; mostly 0."""
    rule = _RULES.get(packet)
    return 0 if rule is None else rule(args, result)


def _reduction(args: tuple[Any, ...], result: Tensor) -> int:
    """A sum in a wider type, as of a mask in int64, is the sum of a copy in that type.

    But for the one pair of types that CUDA's kernels read as they are: half into float32.
    """
    source = args[0]
    half = source.dtype in (torch.float16, torch.bfloat16)
    read = source.device.type == "cuda" and half and result.dtype == torch.float32
    if source.dtype == result.dtype or read:
        return 0
    return int(source.numel() * result.element_size())


def _softmax_backward(args: tuple[Any, ...], result: Tensor) -> int:
    """On CUDA the gradient times the output is a tensor of its own."""
    if result.device.type != "cuda":
        return 0
    gradient, output = args[:2]
    wider = torch.promote_types(gradient.dtype, output.dtype)
    return int(output.numel() * torch.empty((), dtype=wider, device="meta").element_size())


_RULES: Final[dict[Any, Callable[[tuple[Any, ...], Any], int]]] = {
    **dict.fromkeys((_aten.sum, _aten.nansum, _aten.mean, _aten.prod), _reduction),
    _aten._softmax_backward_data: _softmax_backward,
}
