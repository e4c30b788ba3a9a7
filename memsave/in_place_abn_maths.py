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
    "affine_",
    "channels_at_once",
    "compute_dtype",
    "invert_",
    "is_dense",
    "normalise_",
    "per_channel",
    "scale_and_shift",
    "slabs",
    "steps",
]

Activation = Literal["leaky_relu", "elu", "identity"]

# A temporary of backward holds an eighth of the activation's bytes: smaller ones would cost more
# in launches, and in tracing, than they save. Below SMALL_ELEMENTS (16 MiB in float32) nothing is
# worth saving: each part is five operators more, whose threads wait for each other, and on cores in
# use they wait long. Parts of 4 MiB took twice the time of parts of 16 MiB there.
PARTS = 8
SMALL_ELEMENTS = 2**22


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
    if is_dense(x):
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


def slabs(z: Tensor) -> list[tuple[slice, ...]]:
    """Return indices that cut ``z`` into slabs of one sample's places; none but channels last."""
    if z.is_contiguous() or not is_dense(z):
        return []
    side = next(d for d in range(2, z.dim()) if z.shape[d] > 1)
    places, values = z.shape[side], z[0].numel()
    step = max(math.ceil(places / _parts(z)), SMALL_ELEMENTS * places // max(1, values))
    all_before = (slice(None),) * (side - 1)
    return [
        (slice(n, n + 1), *all_before, slice(first, first + step))
        for n in range(z.shape[0])
        for first in range(0, places, step)
    ]


def affine_(y: Tensor, gain: Tensor, shift: Tensor) -> None:
    """Overwrite ``y`` (N, C, *) with ``gain * y + shift`` of each channel, in one pass.

    Batch norm about mean 0 and variance 1 is that, in a third of the time of ``addcmul``.
    """
    if not is_dense(y):
        torch.addcmul(per_channel(shift, y), y, per_channel(gain, y), out=y)
        return
    zero, one, none = torch.zeros_like(gain), torch.ones_like(gain), gain.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        y, gain, shift, zero, one, False, 0.0, 0.0, out=y, save_mean=none, save_invstd=none
    )


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` (C,) as they broadcast over ``like`` (N, C, *)."""
    return values.view(-1, *(1,) * (like.dim() - 2))


def channels_at_once(z: Tensor) -> int:
    """Return how many channels of ``z`` (N, C, *) to work on together."""
    channels = max(1, z.shape[1])
    step = max(math.ceil(channels / _parts(z)), SMALL_ELEMENTS * channels // max(1, z.numel()))
    # Channels last: neighbours in memory are read together or wasted.
    return min(channels, step if z.is_contiguous() else max(step, 16))


def steps(total: int, step: int) -> list[slice]:
    """Return slices of ``step`` that make up ``total``; the last one may be smaller."""
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def _parts(z: Tensor) -> int:
    return PARTS * compute_dtype(z).itemsize // z.itemsize


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of statistics, scale and shift beside ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` lies in memory in the order of its dimensions, or channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))
