"""From an operator's live arguments to a call as plain data, while a step is traced."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bench.predict.library_calls import ConvolutionCall, Direction, OperatorCall

__all__ = [
    "convolution_call",
    "operand_format",
    "operator_call",
    "runs_without_cudnn",
]


class _NotPlainError(Exception):
    """An argument that is no plain data, as a generator or a storage."""


def convolution_call(
    direction: Direction,
    source: Tensor,
    weight: Tensor,
    output: Tensor,
    arguments: tuple[Any, ...],
    channels_last: bool,
) -> ConvolutionCall:
    """Return the call.

    ``arguments``: stride, padding, dilation, transposed, output padding and groups.
    ``output`` is the forward's result or its gradient, which have one shape.
    """
    stride, padding, dilation, transposed, output_padding, groups = arguments
    return ConvolutionCall(
        direction=direction,
        dtype=str(source.dtype).removeprefix("torch."),
        channels_last=channels_last,
        transposed=bool(transposed),
        groups=int(groups),
        input=tuple(source.shape),
        weight=tuple(weight.shape),
        output=tuple(output.shape),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        output_padding=tuple(output_padding),
    )


def operator_call(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, device_type: str
) -> OperatorCall | None:
    """Return the call as data; None where it has no tensor on the device or an odd argument."""
    try:
        plain = [_plain(list(args), device_type), _plain(kwargs or {}, device_type)]
    except _NotPlainError:
        return None
    call = OperatorCall(str(func), json.dumps(plain, sort_keys=True))
    return call if '"tensor"' in call.arguments else None


def _plain(value: Any, device_type: str) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value, device_type)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part, device_type) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part, device_type) for name, part in value.items()}
    for kind, name in (
        (torch.dtype, "dtype"),
        (torch.device, "device"),
        (torch.memory_format, "memory_format"),
        (torch.layout, "layout"),
    ):
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.").partition(":")[0]}
    raise _NotPlainError


def _tensor(tensor: Tensor, device_type: str) -> dict[str, Any]:
    data: dict[str, Any] = {
        "tensor": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    if not tensor.is_contiguous():
        data["stride"] = list(tensor.stride())
    if tensor.device.type != device_type:
        data["cpu"] = True
    return data


def operand_format(source: Tensor, weight: Tensor) -> torch.memory_format:
    """Return how cuDNN is given its operands: channels last as soon as one of the two is."""
    if source.dtype != torch.float64:
        for tensor in (source, weight):
            suggested = suggest_memory_format(tensor)
            if suggested != torch.contiguous_format:
                return suggested
    return torch.contiguous_format


def runs_without_cudnn(device_type: str, *convolution: Any) -> bool:
    """Depthwise 3D convolutions run in torch's own kernel, which takes no workspace."""
    source, weight, _, _, _, _, transposed, _, groups = convolution
    if device_type == "cuda":
        return "Cudnn" not in str(torch._C._select_conv_backend(*convolution))
    depthwise = groups > 1 and groups == source.shape[1] and weight.shape[0] % groups == 0
    return bool(depthwise and source.dim() == 5 and not transposed)
