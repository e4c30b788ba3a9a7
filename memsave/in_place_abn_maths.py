"""The arithmetic of in-place ABN on plain PyTorch operators, without autograd.

A trailing underscore: the first argument is overwritten. Per channel, y = scale * xhat + shift and
z = act(y); statistics, scale and shift are float32 beside half activations, float64 beside float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    Channels are independent of each other, so a few at a time keep the temporaries small.
    """
    step = channels_at_once(z)
    per_channel = (1, -1) + (1,) * (z.dim() - 2)
    whole = (z, dz, *(t.view(per_channel) for t in (scale, shift, rstd)))
    sums = []
    for z_part, dz_part, *channel in zip(*(torch.split(t, step, 1) for t in whole), strict=True):
        sums.append(
            _backward_part_(
                z_part, dz_part, channel, batch_statistics, activation, activation_param
            )
        )
    d_scale, d_shift = (torch.cat(parts, 1).flatten() for parts in zip(*sums, strict=True))
    return d_scale, d_shift


def _backward_part_(
    z: Tensor,
    dz: Tensor,
    channel: Sequence[Tensor],
    batch_statistics: bool,
    activation: Activation,
    activation_param: float,
) -> tuple[Tensor, Tensor]:
    """Overwrite some channels of z with their gradient; a function, so that its tensors die."""
    dtype = channel[0].dtype
    y = z.to(dtype)  # z itself, unless half
    dy = activation_backward(dz.to(dtype), y, activation, activation_param)
    invert_(y, activation, activation_param)
    sums = _norm_backward_(y, dy, channel, batch_statistics)
    if y is not z:
        z.copy_(y)
    return sums


def channels_at_once(z: Tensor) -> int:
    """Return how many channels of ``z`` (N, C, *) to work on together."""
    channels = max(1, z.shape[1])
    parts = PARTS * compute_dtype(z).itemsize // z.itemsize
    step = max(math.ceil(channels / parts), SMALL_ELEMENTS * channels // max(1, z.numel()))
    # Channels last: neighbours in memory are read together or wasted.
    return min(channels, step if z.is_contiguous() else max(step, 16))


def _norm_backward_(
    y: Tensor, dy: Tensor, channel: Sequence[Tensor], batch_statistics: bool
) -> tuple[Tensor, Tensor]:
    """Overwrite ``y = scale * xhat + shift`` with the gradient of x; ``dy`` is read.

    ``channel`` is scale, shift and 1/std, each (1, C, 1, ...).
    dx = scale * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)), without the means where the
    statistics did not come from the batch. Returns sum(dy * xhat) and sum(dy) of each channel.
    """
    scale, shift, rstd = channel
    others = [d for d in range(y.dim()) if d != 1]
    centred = y.sub_(shift)
    d_shift = dy.sum(others, keepdim=True)
    d_scale = (dy * centred).sum(others, keepdim=True) / scale
    gain = scale * rstd
    if not batch_statistics:
        torch.mul(dy, gain, out=y)
        return d_scale, d_shift
    share = y.shape[1] / max(1, y.numel())
    torch.addcmul(d_shift * gain * -share, centred, d_scale * rstd * -share, out=y)
    y.addcmul_(dy, gain)
    return d_scale, d_shift


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of statistics, scale and shift beside ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_dense(x: Tensor) -> bool:
    """Whether ``x`` lies in memory in the order of its dimensions, or channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))
