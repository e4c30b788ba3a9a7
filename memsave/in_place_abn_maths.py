"""The arithmetic of in-place ABN on plain PyTorch operators, without autograd.

A trailing underscore: the first argument is overwritten. Per channel, y = scale * xhat + shift and
z = act(y); statistics, scale and shift are float32 beside half activations, float64 beside float64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Activation",
    "activate_",
    "activation_backward",
    "backward_",
    "channels_at_once",
    "compute_dtype",
    "invert_",
    "norm_backward",
    "normalise_",
    "scale_and_shift",
]

Activation = Literal["leaky_relu", "elu", "identity"]

# A temporary of backward holds an eighth of the activation's bytes: smaller ones would cost more
# in launches, and in tracing, than they save. Below SMALL_ELEMENTS (4 MiB in float32) nothing is
# worth saving.
PARTS = 8
SMALL_ELEMENTS = 2**20


def scale_and_shift(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return g and b of each channel, in the type that statistics are computed in."""
    channels, dtype = x.shape[1], compute_dtype(x)
    if weight is None:
        scale = torch.ones(channels, dtype=dtype, device=x.device)
    else:
        scale = weight.detach().to(dtype).abs() + eps
    if bias is None:
        return scale, torch.zeros(channels, dtype=dtype, device=x.device)
    return scale, bias.detach().to(dtype)


def normalise_(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Overwrite ``x`` with its batch norm, update the running statistics, return 1/std."""
    mean, rstd = torch.empty_like(scale), torch.empty_like(scale)
    arguments = (x, scale, shift, running_mean, running_var, batch_statistics, momentum, eps)
    if _is_dense(x):
        torch.ops.aten.native_batch_norm.out(*arguments, out=x, save_mean=mean, save_invstd=rstd)
    else:  # the CPU's kernel goes wrong on such a layout when it writes over its input
        result, mean, rstd = torch.native_batch_norm(*arguments)
        x.copy_(result)
    if batch_statistics:
        return rstd
    assert running_var is not None
    return torch.rsqrt(running_var + eps)  # the operator does not return it on every device


def activate_(y: Tensor, activation: Activation, param: float) -> None:
    """Overwrite ``y`` with ``act(y)``."""
    if activation == "leaky_relu":
        F.leaky_relu_(y, param)
    elif activation == "elu":
        F.elu_(y, param)


def invert_(z: Tensor, activation: Activation, param: float) -> None:
    """Overwrite ``z = act(y)`` with y."""
    if activation == "leaky_relu":
        F.leaky_relu_(z, 1 / param)
    elif activation == "elu":
        # Rounding takes ELU to exactly -alpha, whose y would be -inf; the nearest above has one.
        nearest = -1 + torch.finfo(z.dtype).eps / 2
        negative = torch.log1p((z / param).clamp_(nearest, 0))
        z.clamp_(min=0).add_(negative)


def activation_backward(dz: Tensor, z: Tensor, activation: Activation, param: float) -> Tensor:
    """Return the gradient of y, in a tensor of its own unless the activation is the identity."""
    dy = dz
    if activation == "leaky_relu":
        dy = torch.ops.aten.leaky_relu_backward(dz, z, param, True)
    elif activation == "elu":
        dy = torch.ops.aten.elu_backward(dz, param, 1, 1, True, z)
    return dy


def backward_(
    z: Tensor,
    dz: Tensor,
    scale: Tensor,
    shift: Tensor,
    rstd: Tensor,
    batch_statistics: bool,
    activation: Activation,
    activation_param: float,
) -> tuple[Tensor, Tensor]:
    """Overwrite ``z`` with the gradient of x, return those of scale and shift. ``dz`` is read.

    Channels are independent of each other: a few at a time keep the temporaries small, and in the
    processor's cache from one pass over them to the next.
    """
    d_scale, d_shift = torch.empty_like(scale), torch.empty_like(scale)
    step = channels_at_once(z)
    for first in range(0, z.shape[1], step):
        some = slice(first, first + step)
        d_scale[some], d_shift[some] = _backward_part_(
            z[:, some],
            dz[:, some],
            (scale[some], shift[some], rstd[some]),
            batch_statistics,
            activation,
            activation_param,
        )
    return d_scale, d_shift


def _backward_part_(
    z: Tensor,
    dz: Tensor,
    channel: tuple[Tensor, Tensor, Tensor],
    batch_statistics: bool,
    activation: Activation,
    activation_param: float,
) -> tuple[Tensor, Tensor]:
    """Overwrite some channels of z with their gradient; a function, so that its tensors die."""
    dtype = channel[0].dtype
    # z itself, unless half, or channels of several samples, which lie apart: the operator has
    # another, unvectorised way for those.
    y = z.to(dtype).contiguous()
    dy = activation_backward(dz.to(dtype), y, activation, activation_param).contiguous()
    invert_(y, activation, activation_param)
    dx, d_scale, d_shift = norm_backward(y, dy, *channel, batch_statistics)
    z.copy_(dx)
    return d_scale, d_shift


def norm_backward(
    y: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, rstd: Tensor, batch_statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and shift of ``y = scale * xhat + shift``, from dy.

    dx = scale * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), without the means where the
    statistics did not come from the batch. PyTorch's operator computes that from a norm's input:
    y serves as well as x, if shift is called its mean and scale its standard deviation, and the
    weight makes up for the difference.
    """
    weight = scale.square() * rstd
    dx, d_scale, d_shift = torch.ops.aten.native_batch_norm_backward(
        dy,
        y,
        weight,
        shift,
        scale.square(),
        shift,
        scale.reciprocal(),
        batch_statistics,
        0.0,
        [True, True, True],
    )
    return dx, d_scale, d_shift


def channels_at_once(z: Tensor) -> int:
    """Return how many channels of ``z`` (N, C, *) to work on together."""
    channels = max(1, z.shape[1])
    parts = PARTS * compute_dtype(z).itemsize // z.itemsize
    step = max(math.ceil(channels / parts), SMALL_ELEMENTS * channels // max(1, z.numel()))
    # Channels last: neighbours in memory are read together or wasted.
    return min(channels, step if z.is_contiguous() else max(step, 16))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of statistics, scale and shift beside ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_dense(x: Tensor) -> bool:
    """Whether ``x`` lies in memory in the order of its dimensions, or channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))
