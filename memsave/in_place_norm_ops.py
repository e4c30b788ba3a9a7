"""The two operators of the in-place norms, as PyTorch sees them: exact in a trace and a compiler.

``memsave::in_place_norm`` overwrites x, ``memsave::in_place_norm_backward`` overwrites z. On CUDA
they run the kernels of ``memsave/kernels``; elsewhere, for float64, and for a tensor whose places
do not lie at one distance from each other, the plain maths. The kernels' buffers are results, of
sizes that follow from shapes alone, so that a step on fake tensors allocates what a real one does;
what the plain maths needs inside stays unseen.
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
from memsave.in_place_group_maths import backward_groups_, normalise_groups_
from memsave.kernels.tiles import Tiling, collapse, kernels_run, kernels_serve, tile

__all__ = ["in_place_norm_", "in_place_norm_backward_"]


@custom_op("memsave::in_place_norm", mutates_args=("x", "running_mean", "running_var"))
def in_place_norm_(
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
    rstd, buffer = _forward_results(x, groups, use_running)
    if x.numel() == 0:
        return rstd.zero_(), buffer
    if kernels_run(x):
        _run_forward_kernels(
            x, weight, bias, running_mean, running_var, groups, use_running,
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
    return _forward_results(x, groups, use_running)


@custom_op("memsave::in_place_norm_backward", mutates_args=("z",))
def in_place_norm_backward_(
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
    d_weight, d_bias, buffer = _backward_results(z, dz, groups)
    if z.numel() == 0:
        return d_weight.zero_(), d_bias.zero_(), buffer
    if kernels_run(z) and kernels_serve(dz):
        _run_backward_kernels(
            z, dz, weight, bias, rstd, groups, use_running, eps, activation, param,
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
    return _backward_results(z, dz, groups)


def _forward_results(x: Tensor, groups: int | None, use_running: bool) -> tuple[Tensor, Tensor]:
    """Return 1/std and the buffer of partial sums and means, both unwritten."""
    statistics = x.shape[1] if groups is None else x.shape[0] * groups
    numbers = 0
    if not use_running and _for_kernels(x):
        numbers = tile(x.shape, groups, _strides(x)).partials + statistics
    dtype = compute_dtype(x)
    return x.new_empty((statistics,), dtype=dtype), x.new_empty((numbers,), dtype=dtype)


def _backward_results(z: Tensor, dz: Tensor, groups: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parameters' gradients and the buffer of partial sums and means, unwritten."""
    dtype, numbers = compute_dtype(z), 0
    if _for_kernels(z) and kernels_serve(dz):
        cut = tile(z.shape, groups, _strides(z), _strides(dz))
        numbers = cut.partials + 2 * cut.statistics
    channels = z.shape[1]
    d_weight, d_bias = z.new_empty((channels,), dtype=dtype), z.new_empty((channels,), dtype=dtype)
    return d_weight, d_bias, z.new_empty((numbers,), dtype=dtype)


def _for_kernels(x: Tensor) -> bool:
    # Whether Triton is there is left out: what is traced here may run on another machine.
    return x.device.type == "cuda" and kernels_serve(x) and x.numel() > 0


def _run_forward_kernels(
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
    rstd: Tensor,
    buffer: Tensor,
) -> None:
    from memsave.kernels.norm_forward import normalise_ as normalise_kernel_
    from memsave.kernels.norm_forward import statistics

    cut, strides = tile(x.shape, groups, _strides(x)), _strides(x)
    if use_running:
        assert running_mean is not None
        assert running_var is not None
        mean = running_mean
        torch.rsqrt(rstd.copy_(running_var).add_(eps), out=rstd)
    else:
        partials, mean = torch.split(buffer, [cut.partials, cut.statistics])
        running = (running_mean, running_var)
        statistics(x, strides, cut, partials, mean, rstd, eps, momentum, *running)
    normalise_kernel_(x, strides, cut, mean, rstd, weight, bias, eps, activation, param)


def _run_backward_kernels(
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
    d_weight: Tensor,
    d_bias: Tensor,
    buffer: Tensor,
) -> None:
    from memsave.kernels.norm_backward import gradient_, sums

    at, dz_at = _strides(z), _strides(dz)
    cut: Tiling = tile(z.shape, groups, at, dz_at)
    partials, means = torch.split(buffer, [cut.partials, 2 * cut.statistics])
    rest = (weight, bias, eps, activation, param)
    sums(z, at, dz, dz_at, cut, partials, d_weight, d_bias, means, *rest)
    gradient_(z, at, dz, dz_at, cut, rstd, None if use_running else means, *rest)


def _strides(x: Tensor) -> tuple[int, int, int]:
    strides = collapse(x)
    assert strides is not None
    return strides
