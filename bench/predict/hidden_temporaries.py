"""What operators take inside, beside their results, by torch's own CUDA code; cards do not matter.

These are exact: the operators' code on the host allocates so, whatever card is below. What cuDNN,
cuBLAS and a kernel's own tuning take depends on the card, see ``bench.predict.workspaces``; the
buffers of reductions do so a little, see ``bench.predict.reduction_buffers``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from bench.predict.dense_copies import dense_copies
from bench.predict.reduction_buffers import reduction_buffers

__all__ = ["bias_gradient_bytes", "hidden_bytes", "kept_bytes"]

_aten = torch.ops.aten
_HALF: Final = (torch.float16, torch.bfloat16)


def hidden_bytes(packet: Any, args: tuple[Any, ...], result: Any) -> tuple[int, ...]:
    """Return the sizes of what an operator holds while it runs, taken after its result."""
    rule = _RULES.get(packet)
    if rule is None:
        return dense_copies(packet, args)
    return tuple(size for size in rule(args, result) if size)


def kept_bytes(packet: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes behind a result that holds more than its own numbers; mostly 0.

    A few losses are computed for every number and reduced into the same storage, which keeps its
    size (seen on torch 2.11 and 2.13, on CUDA and on the CPU).
    """
    place = _REDUCED_IN_PLACE.get(packet)
    reduction = 0 if place is None else args[place] if len(args) > place else 1
    return int(args[0].numel() * args[0].element_size()) if reduction else 0


def bias_gradient_bytes(gradient: Tensor) -> tuple[int, ...]:
    """Return the sizes of what the sum holds that is the gradient of a convolution's bias."""
    dims = [d for d in range(gradient.dim()) if d != 1]
    part = max(4, gradient.element_size())
    return _buffers((gradient, dims), gradient, part)


def _reduction(args: tuple[Any, ...], result: Tensor) -> tuple[int, ...]:
    """A sum in a wider type, as of a mask in int64, is the sum of a copy in that type.

    But for the one pair of types that CUDA's kernels read as they are: half into float32.
    """
    source = args[0]
    half = source.dtype in _HALF
    read = source.device.type == "cuda" and half and result.dtype == torch.float32
    copied = source.dtype != result.dtype and not read
    part = max(4, result.element_size()) if result.is_floating_point() else result.element_size()
    return (
        int(source.numel() * result.element_size()) if copied else 0,
        *_buffers(args, source, part),
    )


def _extreme(args: tuple[Any, ...], result: Tensor) -> tuple[int, ...]:
    """A part is as large as a number; or as a yes or no."""
    return _buffers(args, args[0], result.element_size())


def _norm(args: tuple[Any, ...], result: Tensor) -> tuple[int, ...]:
    return _buffers((args[0], *args[2:3]), args[0], max(4, result.element_size()))


def _spread(args: tuple[Any, ...], _: Any) -> tuple[int, ...]:
    """Of a variance, a part is a mean, a sum of squares and two counts."""
    wide = args[0].dtype == torch.float64
    return _buffers(args, args[0], 32 if wide else 16, vector=2)


def _buffers(
    args: tuple[Any, ...], source: Tensor, part_bytes: int, vector: int = 4
) -> tuple[int, ...]:
    if source.device.type != "cuda":
        return ()
    dims = args[1] if len(args) > 1 else None
    if dims is None or isinstance(dims, bool):
        dims = ()
    elif isinstance(dims, int):
        dims = (dims,)
    return reduction_buffers(source, tuple(dims), part_bytes, vector=vector)


def _dense_input(args: tuple[Any, ...], _: Tensor) -> tuple[int, ...]:
    """Softmax's kernels on CUDA read a contiguous input; another is copied."""
    source = args[0]
    if source.device.type != "cuda" or source.is_contiguous():
        return ()
    return (int(source.numel() * source.element_size()),)


def _safe_softmax(args: tuple[Any, ...], result: Tensor) -> tuple[int, ...]:
    """Rows that are masked whole are looked for: a yes or no by number, by row, and a zero."""
    dim, rank = int(args[1]), max(1, result.dim())
    if result.device.type != "cuda" or not result.numel():
        return ()
    side = result.shape[dim % rank] if result.dim() else 1
    return (result.numel(), result.numel() // side, result.element_size())


def _unreduced(args: tuple[Any, ...], result: Tensor) -> tuple[int, ...]:
    """On CUDA what is reduced into a loss of one number is a tensor beside the loss's own room."""
    reduction = args[2] if len(args) > 2 else 1
    if args[0].device.type != "cuda" or not reduction:
        return ()
    return (int(args[0].numel() * result.element_size()),)


def _softmax_backward(args: tuple[Any, ...], result: Tensor) -> tuple[int, ...]:
    """On CUDA the gradient times the output is a tensor of its own."""
    if result.device.type != "cuda":
        return ()
    gradient, output = args[:2]
    wider = torch.promote_types(gradient.dtype, output.dtype)
    return (int(output.numel() * wider.itemsize),)


def _differences(args: tuple[Any, ...], result: Tensor) -> tuple[int, ...]:
    """The gradient of distances is added up over a part for each pair of points."""
    gradient, _, second, power = args[:4]
    if result.device.type != "cuda" or not power or not gradient.numel():
        return ()
    return (int(result.nbytes * second.shape[-2]),)


# Loss -> where its arguments say how it is reduced: 0 not at all.
_REDUCED_IN_PLACE: Final = {
    _aten.binary_cross_entropy: 3,
    _aten.mse_loss: 2,
    _aten.smooth_l1_loss: 2,
    _aten.soft_margin_loss: 2,
}

_Rule = Callable[[tuple[Any, ...], Any], tuple[int, ...]]

_RULES: Final[dict[Any, _Rule]] = {
    **dict.fromkeys((_aten.sum, _aten.nansum, _aten.mean, _aten.prod), _reduction),
    **dict.fromkeys((_aten.amax, _aten.amin, _aten.any, _aten.all), _extreme),
    **dict.fromkeys((_aten.var, _aten.std, _aten.var_mean, _aten.std_mean), _spread),
    _aten.linalg_vector_norm: _norm,
    **dict.fromkeys((_aten._softmax, _aten._log_softmax), _dense_input),
    **dict.fromkeys((_aten.mse_loss, _aten.smooth_l1_loss), _unreduced),
    _aten._safe_softmax: _safe_softmax,
    _aten._softmax_backward_data: _softmax_backward,
    _aten._cdist_backward: _differences,
}
