"""One call made on a GPU, and what it took beside its operands and results.

The figure is the allocator's peak of requested bytes while the call runs, less what is requested
once it is over and its results are still there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cuda import Cuda
from bench.predict.library_calls import ConvolutionCall, OperatorCall

__all__ = ["convolution_operation", "operator_operation", "take_reading"]

Operation = Callable[[], Any]

_NOT_HERE = re.compile(r"out of memory|STATUS_ALLOC_FAILED|unable to find an engine", re.IGNORECASE)
_aten = torch.ops.aten


def take_reading(
    cuda: Cuda, operation: Callable[[], Operation], tensor_bytes: int
) -> dict[str, Any]:
    """Make the operands, run the call twice, and return ``first_bytes`` and ``workspace_bytes``.

    Where that cannot be, ``skipped`` says why: operands beyond the free memory, or a call that the
    GPU's memory or libraries refuse.
    """
    free_bytes, _ = cuda.mem_get_info()
    if tensor_bytes > free_bytes:
        return {"skipped": f"its tensors are {tensor_bytes} bytes, {free_bytes} are free"}
    try:
        run = operation()
        first = _excess_bytes(cuda, run)
        return {"first_bytes": first, "workspace_bytes": _excess_bytes(cuda, run)}
    except (RuntimeError, NotImplementedError) as error:
        if _is_lost(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kind = "refused" if _NOT_HERE.search(str(error)) else "failed"
        return {"skipped": f"{kind}: {lines[0][:200]}"}


def _is_lost(error: Exception) -> bool:
    """Whether the context is gone, so that every later call would fail too."""
    return "illegal memory access" in str(error) or "device-side assert" in str(error)


def _excess_bytes(cuda: Cuda, run: Operation) -> int:
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    results = run()
    cuda.synchronize()
    stats = cuda.memory_stats()
    del results
    return stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"]


def convolution_operation(call: ConvolutionCall, device: torch.device) -> Operation:
    """Return what makes the call: the forward pass, or one of the gradients alone."""
    dtype = getattr(torch, call.dtype)
    spatial = len(call.input) - 2
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(spatial)
    layout = last if call.channels_last and last is not None else torch.contiguous_format

    def made(shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device).to(memory_format=layout)

    options = (
        *(list(call.stride), list(call.padding), list(call.dilation)),
        *(call.transposed, list(call.output_padding), call.groups),
    )
    weight = made(call.weight)
    if call.direction == "forward":
        source = made(call.input)
        return lambda: _aten.convolution.default(source, weight, None, *options)
    source, gradient = made(call.input), made(call.output)
    mask = [call.direction == "input_gradient", call.direction == "weight_gradient", False]
    return lambda: _aten.convolution_backward.default(
        gradient, source, weight, None, *options, mask
    )


def operator_operation(call: OperatorCall, device: torch.device) -> Operation:
    """Return what makes the call: on ones, and zeros where the type is a whole number's."""
    args, kwargs = json.loads(call.arguments)
    positional = [_made(value, device) for value in args]
    named = {name: _made(value, device) for name, value in kwargs.items()}
    _, packet, overload = call.operator.split(".")
    operator = getattr(getattr(_aten, packet), overload)
    return lambda: operator(*positional, **named)


def _made(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_made(part, device) for part in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return _tensor(value, torch.device("cpu") if value.get("cpu") else device)
    (kind, name), *_ = value.items()
    return device if kind == "device" and name != "cpu" else _of_torch(kind, name)


def _of_torch(kind: str, name: str) -> Any:
    return torch.device(name) if kind == "device" else getattr(torch, name)


def _tensor(value: dict[str, Any], device: torch.device) -> Tensor:
    dtype = getattr(torch, value["dtype"])
    stride = value.get("stride")
    if stride is None:
        tensor = torch.empty(value["tensor"], dtype=dtype, device=device)
    else:
        tensor = torch.empty_strided(value["tensor"], stride, dtype=dtype, device=device)
        if 0 in stride:  # expanded: its one number cannot be written through every view of it
            return tensor.zero_() if tensor.numel() <= 1 else _expanded(value, dtype, device)
    return tensor.fill_(1) if dtype.is_floating_point or dtype.is_complex else tensor.zero_()


def _expanded(value: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    sizes = [
        1 if step == 0 else side
        for side, step in zip(value["tensor"], value["stride"], strict=True)
    ]
    return torch.zeros(sizes, dtype=dtype, device=device).expand(value["tensor"])
