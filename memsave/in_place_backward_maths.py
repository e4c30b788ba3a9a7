"""The gradient of an in-place norm on plain PyTorch operators, a part of the tensor at a time.

A trailing underscore: the first argument is overwritten. z = act(y), y = scale * xhat + shift; c
channels of a part; an ``act`` is an activation and its parameter. A statistic, of which 1/std tells
how many there are, is that of one channel or of several, next to each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memsave.in_place_abn_maths import (
    Activation,
    affine_,
    channels_at_once,
    invert_,
    is_dense,
    per_channel,
    slabs,
    steps,
)

__all__ = [
    "backward_",
    "coefficients",
    "part_gradient_",
    "part_sums",
    "slab_gradient_",
    "slab_sums",
]

Act = tuple[Activation, float]


def backward_(
    z: Tensor,
    dz: Tensor,
    scale: Tensor,
    shift: Tensor,
    rstd: Tensor,
    batch_statistics: bool,
    activation: Activation,
    param: float,
) -> Tensor:
    """Overwrite ``z`` (N, C, *) with the gradient of x; return those of scale and shift, (2, C).

    Statistics are independent of each other: a few at a time keep the temporaries small, and in
    the processor's cache from one pass over them to the next. Where a place's channels lie side by
    side, slabs of places take turns instead, twice: for the sums, then for the gradient.
    """
    act, parts = (activation, param), slabs(z)
    if parts:
        sums = slab_sums(z, dz, parts, scale, shift, act)
        numbers = coefficients(sums, scale, shift, rstd, z.numel(), batch_statistics)
        slab_gradient_(z, dz, parts, numbers, act)
        return sums
    sums = scale.new_empty(2, z.shape[1])
    in_group, step = z.shape[1] // len(rstd), channels_at_once(z)
    buffer = scale.new_empty(z[:, :step].numel())
    for some in steps(len(rstd), max(1, step // in_group)):
        own = slice(some.start * in_group, some.stop * in_group)
        part = (z[:, own], dz[:, own], (scale[own], shift[own], rstd[some]))
        if in_group <= step:
            sums[:, own] = _part_backward_(*part, batch_statistics, act, buffer)
        else:
            sums[:, own] = _large_group_backward_(*part, act, buffer, step)
    return sums


def _part_backward_(
    z: Tensor,
    dz: Tensor,
    norm: tuple[Tensor, Tensor, Tensor],
    batch_statistics: bool,
    act: Act,
    buffer: Tensor,
) -> Tensor:
    """Overwrite some channels of z, whole statistics, with their gradient; return ``part_sums``.

    ``norm``: scale, shift and, of each statistic, 1/std. A function, so that its tensors die.
    """
    scale, shift, rstd = norm
    y, dy = _inverted_(z, dz, act, buffer)
    sums = _gradient_sums(y, dy, scale, shift)
    _combine_(y, dy, *coefficients(sums, scale, shift, rstd, z.numel(), batch_statistics))
    _put_back(y, z)
    return sums


def _large_group_backward_(
    z: Tensor,
    dz: Tensor,
    norm: tuple[Tensor, Tensor, Tensor],
    act: Act,
    buffer: Tensor,
    step: int,
) -> Tensor:
    """Overwrite z (1, c, *), a group too large for a temporary, with its gradient; return sums.

    All its sums come first, of copies of ``step`` channels, so that it is inverted twice.
    """
    scale, shift, rstd = norm
    some = steps(z.shape[1], step)
    sums = torch.cat(
        [part_sums(z[:, s], dz[:, s], scale[s], shift[s], act, buffer) for s in some], 1
    )
    slope, constant, gain = coefficients(sums, scale, shift, rstd, z.numel())
    assert slope is not None
    for s in some:
        part_gradient_(z[:, s], dz[:, s], (slope[s], constant[s], gain[s]), act, buffer)
    return sums


def part_sums(
    z: Tensor,
    dz: Tensor,
    scale: Tensor,
    shift: Tensor,
    act: Act,
    buffer: Tensor,
) -> Tensor:
    """Return the sums (2, c) of dy * xhat and of dy of ``z``, which stays as it is."""
    copy = z.to(scale.dtype, copy=True)
    return _gradient_sums(*_inverted_(copy, dz, act, buffer), scale, shift)


def part_gradient_(
    z: Tensor,
    dz: Tensor,
    numbers: tuple[Tensor | None, Tensor, Tensor],
    act: Act,
    buffer: Tensor,
) -> None:
    """Overwrite ``z`` with the gradient of x, ``numbers`` being its ``coefficients``."""
    y, dy = _inverted_(z, dz, act, buffer)
    _combine_(y, dy, *numbers)
    _put_back(y, z)


def slab_sums(
    z: Tensor,
    dz: Tensor,
    parts: list[tuple[slice, ...]],
    scale: Tensor,
    shift: Tensor,
    act: Act,
) -> Tensor:
    """Return ``part_sums`` of all the slabs together."""
    sums = scale.new_zeros(2, len(scale))
    buffer = scale.new_empty(z[parts[0]].numel())
    for part in parts:
        sums += part_sums(z[part], dz[part], scale, shift, act, buffer)
    return sums


def slab_gradient_(
    z: Tensor,
    dz: Tensor,
    parts: list[tuple[slice, ...]],
    numbers: tuple[Tensor | None, Tensor, Tensor],
    act: Act,
) -> None:
    """Overwrite all the slabs with the gradient of x."""
    buffer = numbers[2].new_empty(z[parts[0]].numel())
    for part in parts:
        part_gradient_(z[part], dz[part], numbers, act, buffer)


def coefficients(
    sums: Tensor,
    scale: Tensor,
    shift: Tensor,
    rstd: Tensor,
    values: int,
    batch_statistics: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return what each channel's y, 1 and dy add to dx, from the channels' sums.

    dx = rstd * (scale * dy - mean(scale * dy) - xhat * mean(scale * dy * xhat)), the means those of
    a statistic, of which there are as many as of 1/std; no means, and nothing of y, where the
    statistics did not come from the batch.
    """
    in_group = len(scale) // len(rstd)
    gain = scale * rstd.repeat_interleave(in_group)
    if not batch_statistics:
        return None, torch.zeros_like(gain), gain
    means = (sums * scale).view(2, len(rstd), in_group).sum(2) * (len(rstd) / values)
    of_channel = (means * rstd).repeat_interleave(in_group, 1)
    slope = -of_channel[0] / scale
    return slope, -slope * shift - of_channel[1], gain


def _inverted_(z: Tensor, dz: Tensor, act: Act, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and dy, of buffer's type, laid out alike and densely.

    y is z itself, overwritten, unless half, or channels of several samples, which lie apart: the
    operator of the sums has another, unvectorised way for those.
    """
    y = z.to(buffer.dtype)
    y = y if is_dense(y) else y.contiguous()
    dy = _activation_backward(dz, y, *act, buffer)
    invert_(y, *act)
    return y, dy


def _activation_backward(
    dz: Tensor, z: Tensor, activation: Activation, param: float, buffer: Tensor
) -> Tensor:
    """Return the gradient of y, in ``buffer`` unless dz is it as it lies."""
    if activation == "identity" and dz.dtype == z.dtype and dz.stride() == z.stride():
        return dz
    dy = buffer.as_strided(z.shape, z.stride())
    if dz.dtype != dy.dtype or activation == "identity":
        dz = dy.copy_(dz)
    if activation == "leaky_relu":
        torch.ops.aten.leaky_relu_backward.grad_input(dz, z, param, True, grad_input=dy)
    elif activation == "elu":
        torch.ops.aten.elu_backward.grad_input(dz, param, 1, 1, True, z, grad_input=dy)
    return dy


def _gradient_sums(y: Tensor, dy: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return the sums (2, c) of dy * xhat and of dy over each channel of y = scale * xhat + shift.

    PyTorch's operator computes them from a norm's input and its statistics: y serves as well as
    x, if shift is called its mean and scale its standard deviation. A weight takes no part in
    them; CUDA's kernel refuses to do without one.
    """
    _, *sums = torch.ops.aten.native_batch_norm_backward(
        dy, y, scale, None, None, shift, scale.reciprocal(), True, 0.0, [False, True, True]
    )
    return torch.stack(sums)


def _combine_(y: Tensor, dy: Tensor, slope: Tensor | None, constant: Tensor, gain: Tensor) -> None:
    """Overwrite ``y`` with ``slope * y + constant + gain * dy``, the three of each channel."""
    if slope is None:  # not slope 0: y may be infinite
        torch.mul(dy, per_channel(gain, y), out=y)
        return
    affine_(y, slope, constant)
    y.addcmul_(dy, per_channel(gain, y))


def _put_back(y: Tensor, z: Tensor) -> None:
    if y.data_ptr() != z.data_ptr():
        z.copy_(y)
