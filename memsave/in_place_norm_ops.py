"""The two operators of the in-place norms, as PyTorch sees them: exact in a trace and a compiler.

``memsave::in_place_norm`` overwrites x, ``memsave::in_place_norm_backward`` overwrites z. On CUDA
they run the kernels of ``memsave/kernels``; elsewhere, for float64, and for a tensor whose places
do not lie at one distance from each other, the plain maths. The kernels' buffers are results, of
sizes that follow from shapes alone, so that a step on fake tensors allocates what a real one does;
what the plain maths needs inside stays unseen. Layers call them through ``overwrite_with_norm`` and
``overwrite_with_gradient``, which leave the dispatcher out where nobody watches.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.library import custom_op

from memsave.in_place_abn_maths import (
    Activation,
    activate_,
    compute_dtype,
    normalise_,
    scale_and_shift,
)
from memsave.in_place_backward_maths import backward_
from memsave.in_place_direct import call
from memsave.in_place_group_maths import backward_groups_, normalise_groups_
from memsave.kernels.tiles import Layout, has_triton, lay_out

__all__ = [
    "in_place_norm_",
    "in_place_norm_backward_",
    "overwrite_with_gradient",
    "overwrite_with_norm",
]

ForwardSettings = tuple[int | None, bool, float, float, str, float]
"""groups, use_running, momentum, eps, activation and its parameter."""
BackwardSettings = tuple[int | None, bool, float, str, float]
"""groups, use_running, eps, activation and its parameter."""


def overwrite_with_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    settings: ForwardSettings,
) -> Tensor:
    """Do what ``in_place_norm_`` does, with as little work for the host as may be; return 1/std."""
    tensors = (x, weight, bias, running_mean, running_var)
    written = (x, running_mean, running_var)
    rstd: Tensor = call(in_place_norm_, _norm_, tensors, settings, written)[0]
    return rstd


def overwrite_with_gradient(
    z: Tensor,
    dz: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    settings: BackwardSettings,
) -> tuple[Tensor, Tensor]:
    """Do what ``in_place_norm_backward_`` does likewise; return weight's and bias's gradients."""
    tensors = (z, dz, weight, bias, rstd)
    d_weight, d_bias, _ = call(in_place_norm_backward_, _norm_backward_, tensors, settings, (z,))
    return d_weight, d_bias


def _norm_(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    groups: int | None,
    use_running: bool,
    momentum: float,
    eps: float,
    activation: str,
    param: float,
) -> tuple[Tensor, Tensor]:
    """Overwrite ``x`` with ``act((|weight| + eps) * xhat + bias)``; return 1/std and a buffer.

    ``groups`` of channels of a sample share statistics; None: a channel of the batch, whose
    running statistics, if given, are updated, or used instead where ``use_running``.
    """
    layout = _layout(groups, x)
    rstd, buffer = _forward_results(x, groups, use_running, layout)
    if x.numel() == 0:
        return rstd.zero_(), buffer
    if layout is not None and has_triton():
        _run_forward_kernels(
            layout, x, weight, bias, running_mean, running_var, use_running,
            momentum, eps, activation, param, rstd, buffer,
        )  # fmt: skip
        return rstd, buffer
    scale, shift = scale_and_shift(x, weight, bias, eps)
    act = cast(Activation, activation)
    if groups is not None:
        rstd.copy_(normalise_groups_(x, groups, scale, shift, eps, act, param))
        return rstd, buffer
    # Statistics in half would overflow or stall, so they are computed beside the buffers.
    mean, var = (b if b is None else b.to(scale.dtype) for b in (running_mean, running_var))
    rstd = normalise_(x, scale, shift, mean, var, not use_running, momentum, eps)
    activate_(x, act, param)
    for kept, value in ((running_mean, mean), (running_var, var)):
        if kept is not None and value is not None and kept is not value and not use_running:
            kept.copy_(value)
    return rstd, buffer


in_place_norm_ = custom_op(
    "memsave::in_place_norm", _norm_, mutates_args=("x", "running_mean", "running_var")
)


@in_place_norm_.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    running_mean: Tensor | None,  # noqa: ARG001
    running_var: Tensor | None,  # noqa: ARG001
    groups: int | None,
    use_running: bool,
    momentum: float,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    activation: str,  # noqa: ARG001
    param: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return _forward_results(x, groups, use_running, _layout(groups, x))


def _norm_backward_(
    z: Tensor,
    dz: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    groups: int | None,
    use_running: bool,
    eps: float,
    activation: str,
    param: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite ``z`` with the gradient of x; return those of weight and bias, and a buffer.

    Both are of the statistics' type. ``dz`` is only read.
    """
    layout = _layout(groups, z, dz)
    d_weight, d_bias, buffer = _backward_results(z, layout)
    if z.numel() == 0:
        return d_weight.zero_(), d_bias.zero_(), buffer
    if layout is not None and has_triton():
        _run_backward_kernels(
            layout, z, dz, weight, bias, rstd, use_running, eps, activation, param,
            d_weight, d_bias, buffer,
        )  # fmt: skip
        return d_weight, d_bias, buffer
    scale, shift = scale_and_shift(z, weight, bias, eps)
    act = cast(Activation, activation)
    if groups is None:
        sums = backward_(z, dz, scale, shift, rstd, not use_running, act, param)
    else:
        sums = backward_groups_(z, dz, groups, scale, shift, rstd, act, param)
    # Copies: an operator's results may not share a storage.
    d_weight.copy_(sums[0] if weight is None else torch.where(weight < 0, -sums[0], sums[0]))
    return d_weight, d_bias.copy_(sums[1]), buffer


in_place_norm_backward_ = custom_op(
    "memsave::in_place_norm_backward", _norm_backward_, mutates_args=("z",)
)


@in_place_norm_backward_.register_fake
def _(
    z: Tensor,
    dz: Tensor,
    weight: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    rstd: Tensor,  # noqa: ARG001
    groups: int | None,
    use_running: bool,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    activation: str,  # noqa: ARG001
    param: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_results(z, _layout(groups, z, dz))


def _forward_results(
    x: Tensor, groups: int | None, use_running: bool, layout: Layout | None
) -> tuple[Tensor, Tensor]:
    """Return 1/std and the buffer of partial sums and means, both unwritten."""
    statistics = x.shape[1] if groups is None else x.shape[0] * groups
    numbers = 0 if use_running or layout is None else layout.cut.partials + statistics
    dtype = compute_dtype(x)
    return x.new_empty((statistics,), dtype=dtype), x.new_empty((numbers,), dtype=dtype)


def _backward_results(z: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parameters' gradients and the buffer of partial sums and means, unwritten."""
    dtype, channels = compute_dtype(z), z.shape[1]
    numbers = 0 if layout is None else layout.cut.partials + 2 * layout.cut.statistics
    d_weight, d_bias = z.new_empty((channels,), dtype=dtype), z.new_empty((channels,), dtype=dtype)
    return d_weight, d_bias, z.new_empty((numbers,), dtype=dtype)


def _layout(groups: int | None, x: Tensor, dz: Tensor | None = None) -> Layout | None:
    return lay_out(groups, x, dz) if _for_kernels(x) else None


def _for_kernels(x: Tensor) -> bool:
    # Whether Triton is there is left out: what is traced here may run on another machine.
    return x.device.type == "cuda" and x.numel() > 0


def _run_forward_kernels(
    layout: Layout,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_running: bool,
    momentum: float,
    eps: float,
    activation: str,
    param: float,
    rstd: Tensor,
    buffer: Tensor,
) -> None:
    from memsave.kernels.norm_forward import normalise_ as normalise_kernel_
    from memsave.kernels.norm_forward import statistics

    cut, strides, _ = layout
    if use_running:
        assert running_mean is not None
        assert running_var is not None
        mean = running_mean
        torch.rsqrt(rstd.copy_(running_var).add_(eps), out=rstd)
    else:
        mean = _rest(buffer, cut.partials)
        running = (running_mean, running_var)
        statistics(x, strides, cut, buffer, mean, rstd, eps, momentum, *running)
    normalise_kernel_(x, strides, cut, mean, rstd, weight, bias, eps, activation, param)


def _run_backward_kernels(
    layout: Layout,
    z: Tensor,
    dz: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    use_running: bool,
    eps: float,
    activation: str,
    param: float,
    d_weight: Tensor,
    d_bias: Tensor,
    buffer: Tensor,
) -> None:
    from memsave.kernels.norm_backward import gradient_, sums

    cut, at, dz_at = layout
    means = _rest(buffer, cut.partials)
    rest = (weight, bias, eps, activation, param)
    sums(z, at, dz, dz_at, cut, buffer, d_weight, d_bias, means, *rest)
    gradient_(z, at, dz, dz_at, cut, rstd, None if use_running else means, *rest)


def _rest(buffer: Tensor, first: int) -> Tensor:
    return buffer.as_strided((buffer.shape[0] - first,), (1,), first)
