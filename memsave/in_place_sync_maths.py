"""The parts of in-place ABN between which processes exchange their sums: kernels, or plain maths.

Per channel, over what this process has of the batch. A trailing underscore: the first argument is
overwritten. All statistics are of ``compute_dtype``.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from memsave.in_place_abn_maths import (
    Activation,
    channels_at_once,
    compute_dtype,
    scale_and_shift,
    slabs,
    steps,
)
from memsave.in_place_backward_maths import part_gradient_, part_sums, slab_gradient_, slab_sums
from memsave.kernels.tiles import Layout, kernels_run, lay_out

__all__ = ["gradient_", "local_means", "local_statistics"]

Settings = tuple[float, str, float]
"""eps, activation and its parameter."""


def local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel of ``x`` (N, C, *); 0 where there is none."""
    dtype = compute_dtype(x)
    mean, var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return mean, var
    if (layout := _kernels(x)) is not None:
        from memsave.kernels.norm_forward import statistics

        cut, strides, _ = layout
        partials = mean.new_empty(cut.partials)
        statistics(x, strides, cut, partials, mean, var, as_variance=True)
        return mean, var
    parts = [
        torch.ops.aten.batch_norm_update_stats(part.to(dtype), None, None, 0.0)
        for part in torch.split(x, channels_at_once(x), 1)
    ]
    return torch.cat([m for m, _ in parts]), torch.cat([v for _, v in parts])


def local_means(
    z: Tensor, dz: Tensor, weight: Tensor | None, bias: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight and bias, and the means (2, C) of scale dy, scale dy xhat."""
    eps, activation, param = settings
    scale, shift = scale_and_shift(z, weight, bias, eps)
    if z.numel() == 0:
        return torch.zeros_like(scale), torch.zeros_like(scale), scale.new_zeros(2, len(scale))
    if (layout := _kernels(z, dz)) is not None:
        from memsave.kernels.norm_backward import sums

        cut, at, dz_at = layout
        d_weight, d_bias = torch.empty_like(scale), torch.empty_like(scale)
        means = scale.new_empty(2, len(scale))
        partials = scale.new_empty(cut.partials)
        sums(z, at, dz, dz_at, cut, partials, d_weight, d_bias, means, weight, bias, *settings)
        return d_weight, d_bias, means
    act, parts = (cast(Activation, activation), param), slabs(z)
    totals = (
        slab_sums(z, dz, parts, scale, shift, act) if parts else _sums(z, dz, scale, shift, act)
    )
    d_weight, d_bias = totals.unbind()
    means = totals.flip(0) * scale * (z.shape[1] / z.numel())
    if weight is not None:
        d_weight = torch.where(weight < 0, -d_weight, d_weight)
    return d_weight, d_bias, means


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
    if (layout := _kernels(z, dz)) is not None:
        from memsave.kernels.norm_backward import gradient_ as gradient_kernel_

        cut, at, dz_at = layout
        gradient_kernel_(z, at, dz, dz_at, cut, rstd, means, weight, bias, *settings)
        return
    scale, shift = scale_and_shift(z, weight, bias, eps)
    act, parts = (cast(Activation, activation), param), slabs(z)
    slope = -means[1] * rstd / scale
    constant, gain = -slope * shift - means[0] * rstd, scale * rstd
    if parts:
        slab_gradient_(z, dz, parts, (slope, constant, gain), act)
        return
    step = channels_at_once(z)
    buffer = scale.new_empty(z[:, :step].numel())
    for some in steps(z.shape[1], step):
        own = (slope[some], constant[some], gain[some])
        part_gradient_(z[:, some], dz[:, some], own, act, buffer)


def _sums(
    z: Tensor, dz: Tensor, scale: Tensor, shift: Tensor, act: tuple[Activation, float]
) -> Tensor:
    step = channels_at_once(z)
    buffer = scale.new_empty(z[:, :step].numel())
    parts = [
        part_sums(z[:, s], dz[:, s], scale[s], shift[s], act, buffer)
        for s in steps(z.shape[1], step)
    ]
    return torch.cat(parts, 1)


def _kernels(x: Tensor, dz: Tensor | None = None) -> Layout | None:
    """Return how the kernels see the tensors, or None if they do not run or cannot take them."""
    return lay_out(None, x, dz) if kernels_run(x) else None
