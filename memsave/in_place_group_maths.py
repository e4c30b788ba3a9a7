"""The arithmetic of in-place group and instance norm on plain PyTorch operators, without autograd.

The reference for the kernels, and what runs where they do not. A trailing underscore: the first
argument is overwritten. Statistics are float32 beside half activations.

Where samples lie one after the other, their channels are taken for those of one sample, (1, N * C,
S): a few operators on much, instead of many on little. Below, c are the channels of such a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from memsave.in_place_abn_maths import (
    Activation,
    activate_,
    affine_,
    channels_at_once,
    is_dense,
    per_channel,
    steps,
)
from memsave.in_place_backward_maths import backward_

__all__ = ["backward_groups_", "centre_", "normalise_groups_"]

ROW = 1024  # values whose squares are summed in one go


class _Norm(NamedTuple):
    """What a sample's values are computed with: scale and shift (c,), the activation."""

    scale: Tensor
    shift: Tensor
    activation: Activation
    param: float


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
    all_rstd = []
    for (sample,), times in _samples(x):
        norm = _Norm(scale.repeat(times), shift.repeat(times), activation, param)
        all_rstd.append(_normalise_sample_(sample, groups * times, norm, eps))
    return torch.cat(all_rstd)


def _normalise_sample_(x: Tensor, groups: int, norm: _Norm, eps: float) -> Tensor:
    """Overwrite x (1, c, *) with its norm and activation; return 1/std of each group."""
    in_place = x.dtype == norm.scale.dtype and is_dense(x)
    step = x.shape[1] if in_place else channels_at_once(x)
    statistics = [centre_(_wide(x[:, some], norm)) for some in steps(x.shape[1], step)]
    mean, left, var = (torch.cat(values) for values in zip(*statistics, strict=True))
    # From the group's first mean: of nearly equal, huge means the difference alone is exact.
    of_group = (groups, -1)
    apart = mean.view(of_group) - mean.view(of_group)[:, :1] + left.view(of_group)
    apart -= apart.mean(1, keepdim=True)
    # A channel's spread about the group's mean is its own and its mean's distance, squared.
    rstd = torch.rsqrt((var.view(of_group) + apart.square()).mean(1) + eps)
    gain = norm.scale * rstd.repeat_interleave(x.shape[1] // groups)
    shift = norm.shift + gain * (apart.flatten() - left)
    for some in steps(x.shape[1], step):
        centre = None if in_place else mean[some]
        _normalise_part_(x[:, some], centre, gain[some], shift[some], norm)
    return rstd


def _normalise_part_(
    x: Tensor, mean: Tensor | None, gain: Tensor, shift: Tensor, norm: _Norm
) -> None:
    """Overwrite some channels of x, less ``mean`` if any; a function, so that its tensor dies."""
    y = _wide(x, norm)
    if mean is not None:
        y.sub_(per_channel(mean, y))
    affine_(y, gain, shift)
    activate_(y, norm.activation, norm.param)
    if y.data_ptr() != x.data_ptr():
        x.copy_(y)


def centre_(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take each channel's mean off ``y`` (1, c, *); return that, what is left of it, the variance.

    The mean is rounded, which leaves a part of it in y: as much as its last digit, which for a
    huge mean is not little.
    """
    others = (0, *range(2, y.dim()))
    mean = y.mean(others)
    y.sub_(per_channel(mean, y))
    left = y.mean(others)
    return mean, left, (_mean_square(y) - left.square()).clamp_(min=0)


def _mean_square(y: Tensor) -> Tensor:
    """Return the mean of the squares of each channel of ``y`` (1, c, *).

    Squares are summed over short rows first: float32 would lose digits over a long one.
    """
    if not y.is_contiguous():
        rows: Tensor = torch.linalg.vector_norm(y, dim=tuple(range(3, y.dim()))).square_()
        return rows.sum((0, 2)).div_(y[0, 0].numel())
    flat = y.view(y.shape[1], -1)
    whole = flat.shape[1] - flat.shape[1] % ROW
    inside = flat[:, :whole].view(len(flat), -1, ROW)
    squares: Tensor = torch.linalg.vector_norm(inside, dim=2).square_().sum(1)
    if whole < flat.shape[1]:
        squares += torch.linalg.vector_norm(flat[:, whole:], dim=1).square_()
    return squares.div_(flat.shape[1])


def backward_groups_(
    z: Tensor,
    dz: Tensor,
    groups: int,
    scale: Tensor,
    shift: Tensor,
    rstd: Tensor,
    activation: Activation,
    param: float,
) -> Tensor:
    """Overwrite ``z`` with the gradient of x; return those of scale and shift. ``dz`` is read."""
    totals = scale.new_zeros(2, len(scale))
    for number, ((sample, gradient), times) in enumerate(_samples(z, dz)):
        numbers = (scale.repeat(times), shift.repeat(times))
        own = rstd[number * groups * times : (number + 1) * groups * times]
        sums = backward_(sample, gradient, *numbers, own, True, activation, param)
        totals += sums.view(2, times, -1).sum(1)
    return totals


def _wide(x: Tensor, norm: _Norm) -> Tensor:
    """Return ``x`` (1, c, *) in the statistics' type and dense: x itself if it is."""
    wide = x.to(norm.scale.dtype)
    return wide if is_dense(wide) else wide.contiguous()


def _samples(*tensors: Tensor) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """Give views (1, c, *) of the tensors (N, C, *) alike, and how many samples are in them."""
    count, channels = tensors[0].shape[:2]
    if all(t.is_contiguous() for t in tensors):
        yield tuple(t.view(1, count * channels, -1) for t in tensors), count
        return
    for n in range(count):
        yield tuple(t[n : n + 1] for t in tensors), 1
