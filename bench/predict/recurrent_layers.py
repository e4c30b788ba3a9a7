"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` as CUDA runs them, for fake tensors.

On CUDA torch hands such a layer to cuDNN whole: its weights lie in one buffer, and what backward
needs is left in a "reserve" that cuDNN fills. A build without CUDA has no kernel for that, and a
build with one looks at addresses that fake tensors do not have. So the way there is gone here, by
the operators ``_cudnn_rnn`` and ``_cudnn_rnn_backward``, with the memory that torch's own code
around cuDNN takes, in its order. With cuDNN switched off, or for what it does not take, the layer
runs cell by cell in torch's own kernels, as on CUDA.

The sizes of the reserve and of the workspace are not public. The reserve is taken to hold what
backward cannot do without: the gates of every step, the cells, the output of every layer; the
workspace, one layer's gates of every step. Records name both as estimates, ``ESTIMATED``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["CUDNN_CALLS", "ESTIMATED", "register_recurrent_layers"]

ESTIMATED: Final = "reserve and workspace of cuDNN's recurrent layers"

_aten = torch.ops.aten
# By cuDNN's number of a kind: gates of a cell, and what is kept of one beside its output.
_RELU, _TANH, _LSTM, _GRU = range(4)
_GATES: Final = {_RELU: 1, _TANH: 1, _LSTM: 4, _GRU: 3}
_KEPT: Final = {_RELU: 1, _TANH: 1, _LSTM: 5, _GRU: 4}  # the LSTM's cell; the GRU's hidden part
_LAYERS: Final = {"rnn_relu": _RELU, "rnn_tanh": _TANH, "lstm": _LSTM, "gru": _GRU}

_kept: list[torch.library.Library] = []  # a library's kernels go when it does


def register_recurrent_layers() -> None:
    """Register the layers and the GRU's cell for fake CUDA tensors, for the rest of the process."""
    if _kept:
        return
    layers = torch.library.Library("aten", "IMPL", "AutogradCUDA")  # type: ignore[no-untyped-call]
    for name, kind in _LAYERS.items():
        layer = partial(_layer, getattr(_aten, name).input, kind)
        layers.impl(f"{name}.input", layer)  # type: ignore[no-untyped-call]
    cells = torch.library.Library("aten", "IMPL", "Meta")  # type: ignore[no-untyped-call]
    cells.impl("_thnn_fused_gru_cell", _gru_cell)  # type: ignore[no-untyped-call]
    cells.impl("_thnn_fused_gru_cell_backward", _gru_cell_backward)  # type: ignore[no-untyped-call]
    setattr(nn.RNNBase, "flatten_parameters", _flatten_parameters)  # noqa: B010
    _kept.extend((layers, cells))


# -- the way to cuDNN ---------------------------------------------------------------------------


def _layer(func: Any, kind: int, source: Tensor, hidden: Any, params: Any, *rest: Any) -> Any:
    """Run a layer over a whole sequence: by cuDNN where that takes it, else cell by cell."""
    if not torch.cudnn_is_acceptable(source):
        # Not func.decompose, which prefers a formula in Python that knows no fused cells.
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        return func._op_dk(composite, source, hidden, params, *rest)
    has_biases, layers, dropout, train, bidirectional, batch_first = rest
    hx, cx = hidden if kind == _LSTM else (hidden, None)
    size = hx.shape[2] if cx is None else cx.shape[2]
    projected = hx.shape[2] if size != hx.shape[2] else 0
    stride = (4 if has_biases else 2) + (projected > 0)
    buffer = _buffer_of(params)
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        buffer, params = _cast_weights(params, half)
        source, hx = source.to(half), hx.to(half)
        cx = None if cx is None else cx.to(half)
    shape = (kind, size, projected, layers, batch_first, dropout, train, bidirectional)
    output, hy, cy, _, _ = torch._cudnn_rnn(
        source, params, stride, buffer, hx, cx, *shape, [], None
    )
    return (output, hy) if cx is None else (output, hy, cy)


def _buffer_of(weights: Sequence[Tensor]) -> Tensor | None:
    """Return the buffer that the weights are views of, end on end; None where there is none."""
    total = sum(w.numel() for w in weights)
    first = weights[0]
    if len({w.untyped_storage()._cdata for w in weights}) > 1:
        return None
    if first.untyped_storage().nbytes() != total * first.element_size():
        return None
    return first.detach().as_strided((total,), (1,), 0)


def _cast_weights(weights: Sequence[Tensor], half: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Copy the weights into one buffer of autocast's type, so that gradients flow back."""
    buffer = torch.zeros(sum(w.numel() for w in weights), dtype=half, device=weights[0].device)
    return buffer, [v.data.copy_(w) for v, w in zip(_views(buffer, weights), weights, strict=True)]


def _views(buffer: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(buffer, [w.numel() for w in weights])
    return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]


def _flatten_parameters(layer: nn.RNNBase) -> None:
    """Move a layer's weights on CUDA into one buffer, as torch does wherever it can use cuDNN."""
    weights = [w for w in layer._flat_weights if isinstance(w, Tensor) and w.is_cuda]
    if not weights or len(weights) < len(layer._flat_weights):
        return
    distinct = len({id(w) for w in weights}) == len(weights)
    same = len({w.dtype for w in weights}) == 1 and torch.cudnn_is_acceptable(weights[0])
    if not distinct or not same or _buffer_of(weights) is not None:
        return
    with torch.no_grad():
        buffer = weights[0].new_zeros(sum(w.numel() for w in weights))
        for view, weight in zip(_views(buffer, weights), weights, strict=True):
            view.copy_(weight)
            weight.data = view


# -- cuDNN's calls, as torch makes them ---------------------------------------------------------


def _cudnn_rnn(
    source: Tensor, weights: Any, _: int, buffer: Tensor | None, hx: Tensor, cx: Tensor | None,
    kind: int, size: int, projected: int, layers: int, batch_first: bool, _dropout: float,
    train: bool, bidirectional: bool, _batch_sizes: Any, _state: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return output, hidden state, cell state, reserve and weights; shapes as ``nn.LSTM``'s."""
    x = (source.transpose(0, 1) if batch_first else source).contiguous()
    steps, batch = x.shape[:2]
    directions = 2 if bidirectional else 1
    output = x.new_empty((steps, batch, (projected or size) * directions))
    hy = torch.empty_like(hx)
    cy = hx.new_empty(0) if cx is None else torch.empty_like(cx)
    if buffer is None:
        buffer = x.new_zeros(sum(w.numel() for w in weights))
    cells = steps * batch * directions * x.element_size()
    workspace = x.new_empty(cells * _GATES[kind] * size, dtype=torch.uint8)
    kept = cells * layers * (_KEPT[kind] * size + (projected or size))
    reserve = x.new_empty(kept if train else 0, dtype=torch.uint8)
    del workspace
    return output.transpose(0, 1) if batch_first else output, hy, cy, reserve, buffer


def _cudnn_rnn_backward(
    source: Tensor, weights: Any, _: int, buffer: Tensor, hx: Tensor, cx: Tensor | None,
    output: Tensor, grad_output: Tensor | None, grad_hy: Tensor | None, grad_cy: Tensor | None,
    kind: int, size: int, _projected: int, _layers: int, batch_first: bool, _dropout: float,
    _train: bool, bidirectional: bool, _batch_sizes: Any, _state: Any, _reserve: Tensor,
    mask: Sequence[bool],
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of input, hidden state, cell state and of each weight."""
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    grad_hy = torch.zeros_like(hx) if grad_hy is None else grad_hy
    if cx is not None:
        grad_cy = torch.zeros_like(cx) if grad_cy is None else grad_cy
    if batch_first:
        source, grad_output = source.transpose(0, 1), grad_output.transpose(0, 1)
    x, dy = source.contiguous(), grad_output.contiguous()
    dx = source.new_empty(source.shape)
    dhx = torch.empty_like(hx)
    dcx = hx.new_empty(0) if cx is None else torch.empty_like(cx)
    rows = source.shape[0] * source.shape[1] * (2 if bidirectional else 1)
    workspace = x.new_empty(rows * x.element_size() * _GATES[kind] * size, dtype=torch.uint8)
    gradients: list[Tensor] = []
    del x, dy  # what was copied for the first of the two calls goes before the second
    if mask[3]:
        x = source.contiguous()
        gradients = _views(torch.zeros_like(buffer), weights)
        del x
    del workspace
    return dx.transpose(0, 1) if batch_first else dx, dhx, dcx, gradients


CUDNN_CALLS: Final[dict[Any, Callable[..., Any]]] = {
    _aten._cudnn_rnn: _cudnn_rnn,
    _aten._cudnn_rnn_backward: _cudnn_rnn_backward,
}
"""Operators that the tracer follows into what they allocate."""


# -- the GRU's cell -----------------------------------------------------------------------------


def _gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,  # noqa: ARG001
    hidden_bias: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Return the new state, (batch, hidden), and what backward reads, five times as large."""
    del input_gates
    workspace = hidden_gates.new_empty((hx.shape[0], hx.shape[1] * 5))
    return torch.empty_like(hx, memory_format=torch.contiguous_format), workspace


def _gru_cell_backward(
    grad_hy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of both gates, of the old state, and of the biases."""
    gates = (grad_hy.shape[0], grad_hy.shape[1] * 3)
    of_input, of_hidden = workspace.new_empty(gates), workspace.new_empty(gates)
    of_state = torch.empty_like(grad_hy, memory_format=torch.contiguous_format)
    if not has_bias:
        return of_input, of_hidden, of_state, None, None
    return of_input, of_hidden, of_state, of_input.sum(0), of_hidden.sum(0)
