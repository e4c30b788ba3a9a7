"""The parts of in-place ABN between which processes exchange their sums: kernels, or plain maths.

Per channel, over what this process has of the batch. A trailing underscore: the first argument is
overwritten. All statistics are of ``compute_dtype``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from memsave.in_place_abn_maths import (
    Activation,
    activation_backward,
    channels_at_once,
    compute_dtype,
    invert_,
    scale_and_shift,
)
from memsave.kernels.tiles import Tiling, collapse, kernels_run, kernels_serve, tile

__all__ = ["gradient_", "local_means", "local_statistics"]

Settings = tuple[float, str, float]
"""eps, activation and its parameter."""


def local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel of ``x`` (N, C, *); 0 where there is none."""
    dtype = compute_dtype(x)
    mean, var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return mean, var
    if kernels_run(x):
        from memsave.kernels.norm_forward import statistics

        strides, cut = _cut(x, x)
        partials = mean.new_empty(cut.partials)
        statistics(x, strides[0], cut, partials, mean, var, as_variance=True)
        return mean, var
    step, others = channels_at_once(x), [d for d in range(x.dim()) if d != 1]
    parts = [torch.var_mean(p.to(dtype), others, correction=0) for p in torch.split(x, step, 1)]
    return torch.cat([m for _, m in parts]), torch.cat([v for v, _ in parts])


def local_means(
    z: Tensor, dz: Tensor, weight: Tensor | None, bias: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight and bias, and the means (2, C) of scale dy, scale dy xhat."""
    eps, activation, param = settings
    scale, shift = scale_and_shift(z, weight, bias, eps)
    if z.numel() == 0:
        return torch.zeros_like(scale), torch.zeros_like(scale), scale.new_zeros(2, len(scale))
    if _kernels_run_both(z, dz):
        from memsave.kernels.norm_backward import sums

        (at, dz_at), cut = _cut(z, dz)
        d_weight, d_bias = torch.empty_like(scale), torch.empty_like(scale)
        means = scale.new_empty(2, len(scale))
        partials = scale.new_empty(cut.partials)
        sums(z, at, dz, dz_at, cut, partials, d_weight, d_bias, means, weight, bias, *settings)
        return d_weight, d_bias, means
    others, parts = [d for d in range(z.dim()) if d != 1], []
    for _, dy, xhat, _ in _parts(z, dz, scale, shift, scale, activation, param):
        parts.append(torch.stack([dy.sum(others), (dy * xhat).sum(others)]))
    totals = torch.cat(parts, 1)
    d_weight = totals[1]
    if weight is not None:
        d_weight = torch.where(weight < 0, -d_weight, d_weight)
    return d_weight, totals[0], totals * scale * (z.shape[1] / z.numel())


def gradient_(
    z: Tensor,
    dz: Tensor,
    rstd: Tensor,
    means: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
) -> None:
    """Overwrite ``z`` with the gradient of x, ``means`` (2, C) being those of all processes."""
    eps, activation, param = settings
    if z.numel() == 0:
        return
    if _kernels_run_both(z, dz):
        from memsave.kernels.norm_backward import gradient_ as gradient_kernel_

        (at, dz_at), cut = _cut(z, dz)
        gradient_kernel_(z, at, dz, dz_at, cut, rstd, means, weight, bias, *settings)
        return
    scale, shift = scale_and_shift(z, weight, bias, eps)
    numbers = torch.stack([scale * rstd, means[0] * rstd, means[1] * rstd])
    for out, dy, xhat, (gain, mean_dy, mean_dy_xhat) in _parts(
        z, dz, scale, shift, numbers, activation, param
    ):
        out.copy_(dy * gain - mean_dy - xhat * mean_dy_xhat)


def _parts(
    z: Tensor,
    dz: Tensor,
    scale: Tensor,
    shift: Tensor,
    numbers: Tensor,
    activation: str,
    param: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Give, some channels at a time, z, dy, xhat and ``numbers`` (..., C) as these need them."""
    act, step = cast(Activation, activation), channels_at_once(z)
    per_channel = (-1,) + (1,) * (z.dim() - 2)
    for first in range(0, z.shape[1], step):
        some = slice(first, first + step)
        y = z[:, some].to(scale.dtype, copy=True)
        dy = activation_backward(dz[:, some].to(scale.dtype), y, act, param)
        invert_(y, act, param)
        g, b = scale[some].view(per_channel), shift[some].view(per_channel)
        share = numbers[..., some]
        shaped = share.view(*share.shape, *per_channel[1:])
        yield z[:, some], dy, y.sub_(b).div_(g), shaped


def _cut(
    x: Tensor, other: Tensor
) -> tuple[tuple[tuple[int, int, int], tuple[int, int, int]], Tiling]:
    at, other_at = collapse(x), collapse(other)
    assert at is not None
    assert other_at is not None
    return (at, other_at), tile(x.shape, None, at, other_at)


def _kernels_run_both(z: Tensor, dz: Tensor) -> bool:
    return kernels_run(z) and kernels_serve(dz)
