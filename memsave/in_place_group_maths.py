"""The arithmetic of in-place group and instance norm on plain PyTorch operators, without autograd.

The reference for the kernels, and what runs where they do not. Some groups of a sample at a time;
a trailing underscore: the first argument is overwritten. Statistics are float32 beside half
activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from memsave.in_place_abn_maths import (
    Activation,
    activate_,
    activation_backward,
    channels_at_once,
    invert_,
    norm_backward,
)

__all__ = ["backward_groups_", "normalise_groups_"]


def normalise_groups_(
    x: Tensor,
    groups: int,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    activation: Activation,
    param: float,
) -> Tensor:
    """Overwrite ``x`` (N, C, *) with ``act(scale * xhat + shift)``; return 1/std, (N * groups,)."""
    all_rstd = scale.new_empty(x.shape[0], groups)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    for sample, some, channels in _parts(x, groups):
        part = x[sample : sample + 1, channels]
        y = part.to(scale.dtype)  # a view, unless half
        mean, rstd = _statistics(y, some.stop - some.start, eps)
        all_rstd[sample, some] = rstd
        y.sub_(mean.view(per_channel))  # first: a huge mean then costs its own rounding alone
        gain = scale[channels] * rstd.repeat_interleave(y.shape[1] // len(rstd))
        shift_part = shift[channels].view(per_channel)
        torch.addcmul(shift_part, y, gain.view(per_channel), out=y)
        activate_(y, activation, param)
        if y.dtype != x.dtype:
            part.copy_(y)
    return all_rstd.flatten()


def _statistics(y: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean, of each channel's group, and 1/std, of each group, of y (1, c, *).

    By channel first, for which PyTorch has a faster operator than ``var_mean``.
    """
    means, variances = torch.ops.aten.batch_norm_update_stats(y, None, None, 0.0)
    in_group = (groups, -1)
    mean = means.view(in_group).mean(1, keepdim=True)
    # A channel's spread about the group's mean is its own and its mean's distance, squared.
    spread = variances.view(in_group) + (means.view(in_group) - mean).square()
    rstd = torch.rsqrt(spread.mean(1) + eps)
    return mean.expand(in_group[0], y.shape[1] // groups).reshape(-1), rstd


def backward_groups_(
    z: Tensor,
    dz: Tensor,
    groups: int,
    scale: Tensor,
    shift: Tensor,
    rstd: Tensor,
    activation: Activation,
    param: float,
) -> tuple[Tensor, Tensor]:
    """Overwrite ``z`` with the gradient of x, return those of scale and shift. ``dz`` is read."""
    d_scale, d_shift = torch.zeros_like(scale), torch.zeros_like(scale)
    all_rstd = rstd.view(z.shape[0], groups)
    for sample, some, channels in _parts(z, groups):
        sums = _backward_part_(
            z[sample : sample + 1, channels],
            dz[sample : sample + 1, channels],
            scale[channels],
            shift[channels],
            all_rstd[sample, some],
            activation,
            param,
        )
        d_scale[channels] += sums[0]
        d_shift[channels] += sums[1]
    return d_scale, d_shift


def _backward_part_(
    z: Tensor,
    dz: Tensor,
    scale: Tensor,
    shift: Tensor,
    rstd: Tensor,
    activation: Activation,
    param: float,
) -> tuple[Tensor, Tensor]:
    """Overwrite z (1, c, *), some groups of a sample; a function, so that its tensors die.

    Per channel it is a norm whose statistics were given; its group's means are taken off then.
    """
    y = z.to(scale.dtype).contiguous()
    dy = activation_backward(dz.to(scale.dtype), y, activation, param).contiguous()
    invert_(y, activation, param)
    of_channel = rstd.repeat_interleave(len(scale) // len(rstd))
    dx, sum_dy_xhat, sum_dy = norm_backward(y, dy, scale, shift, of_channel, False)
    share = of_channel * (len(rstd) / y.numel())
    mean_dy = _group_sum(sum_dy * scale, len(rstd)) * share
    mean_dy_xhat = _group_sum(sum_dy_xhat * scale, len(rstd)) * share / scale
    per_channel = (1, -1) + (1,) * (y.dim() - 2)
    constant = (mean_dy_xhat * shift - mean_dy).view(per_channel)
    dx.add_(torch.addcmul(constant, y, -mean_dy_xhat.view(per_channel), out=y))
    z.copy_(dx)
    return sum_dy_xhat, sum_dy


def _parts(x: Tensor, groups: int) -> Iterator[tuple[int, slice, slice]]:
    """Give each sample with some groups and their channels, as many as are worked on together."""
    in_group = x.shape[1] // groups
    step = math.ceil(channels_at_once(x[:1]) / in_group)
    for sample in range(x.shape[0]):
        for first in range(0, groups, step):
            end = min(first + step, groups)
            yield sample, slice(first, end), slice(first * in_group, end * in_group)


def _group_sum(values: Tensor, groups: int) -> Tensor:
    """Return for each channel the sum over its group."""
    sums = values.view(groups, -1).sum(1, keepdim=True)
    return sums.expand(groups, len(values) // groups).reshape(-1)
