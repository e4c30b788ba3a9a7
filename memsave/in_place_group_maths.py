"""The arithmetic of in-place group and instance norm on plain PyTorch operators, without autograd.

The reference for the kernels, and what runs where they do not. A sample at a time; a trailing
underscore: the first argument is overwritten. Statistics are float32 beside half activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memsave.in_place_abn_maths import Activation, activate_, activation_backward, invert_

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
    for sample, rstd in zip(x, all_rstd, strict=True):
        y = _grouped(sample, groups).to(scale.dtype)  # a view, unless half
        var, mean = torch.var_mean(y, list(range(1, y.dim())), correction=0, keepdim=True)
        torch.rsqrt(var.flatten() + eps, out=rstd)
        y.sub_(mean).mul_(_like(rstd, y)).mul_(_of_channels(scale, y)).add_(_of_channels(shift, y))
        activate_(y, activation, param)
        if y.dtype != x.dtype:
            _grouped(sample, groups).copy_(y)
    return all_rstd.flatten()


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
    for z_n, dz_n, rstd_n in zip(z, dz, rstd.view(z.shape[0], groups), strict=True):
        y = _grouped(z_n, groups).to(scale.dtype)
        dy = _grouped(dz_n, groups).to(scale.dtype)
        dy = activation_backward(dy, y, activation, param)
        invert_(y, activation, param)
        g = _of_channels(scale, y)
        xhat = y.sub_(_of_channels(shift, y)).div_(g)
        dims = list(range(2, y.dim()))
        sum_dy, sum_dy_xhat = _sum(dy, dims), _sum(dy * xhat, dims)
        d_shift += sum_dy.flatten()
        d_scale += sum_dy_xhat.flatten()
        share = groups / max(1, y.numel())
        mean_dy = (sum_dy * g).sum(1, keepdim=True) * share
        mean_dy_xhat = (sum_dy_xhat * g).sum(1, keepdim=True) * share
        dx = xhat.mul_(-mean_dy_xhat).sub_(mean_dy).addcmul_(dy, g.expand_as(dy))
        dx.mul_(_like(rstd_n, y))
        if dx.dtype != z.dtype:
            _grouped(z_n, groups).copy_(dx)
    return d_scale, d_shift


def _grouped(sample: Tensor, groups: int) -> Tensor:
    """View a sample (C, *) as (groups, C / groups, *)."""
    return sample.view(groups, sample.shape[0] // groups, *sample.shape[1:])


def _of_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(like.shape[:2] + (1,) * (like.dim() - 2))


def _like(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))


def _sum(values: Tensor, dims: list[int]) -> Tensor:
    return values.sum(dims, keepdim=True) if dims else values
