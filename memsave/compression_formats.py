"""Activations in one or two bytes a value, and back: bf16, fp8 (e4m3) and int8.

Works in slabs, so that what is made beside the result stays small whatever the tensor's size. A
channel is an index of dimension 1; a tensor of fewer than two dimensions has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

__all__ = ["FORMATS", "Format", "Scale", "compress", "compressed_bytes", "restore"]

Format = Literal["bf16", "fp8", "int8"]
Scale = Literal["channel", "tensor"]
Noise = Callable[[Tensor], Tensor]  # fills a tensor with values in [0, 1)

FORMATS: dict[Format, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_LARGEST: dict[Format, float] = {"fp8": 448.0, "int8": 127.0}
_SLAB_ELEMENTS = 2**24  # 64 MiB in float32; int8 needs two such


def compressed_bytes(x: Tensor, form: Format, scale: Scale) -> int:
    """Return what ``compress`` will keep of ``x``."""
    values = x.numel() * FORMATS[form].itemsize
    return values if form == "bf16" else values + 4 * _scales(x, scale)


def compress(x: Tensor, form: Format, scale: Scale, noise: Noise) -> tuple[Tensor, ...]:
    """Return ``x`` in ``form``, of the same layout; for fp8 and int8 with its float32 step sizes.

    Errors per element: bf16 ``2^-8 |x|`` (below 1e-38 in all 1e-40); fp8 ``2^-4 |x|`` or
    ``2^-10`` of its step, whichever is more, a step being ``max |x| / 448``; int8 less than one
    step of ``max |x| / 127``, up or down at random so that the mean is x. A channel that holds
    an infinity or a NaN comes back as NaN altogether, one of zeros as zeros.
    """
    if form == "bf16":
        return (x.to(torch.bfloat16),)
    steps = _steps(x, scale, _LARGEST[form])
    values = torch.empty_like(x, dtype=FORMATS[form])
    for slab, target in zip(_slabs(x), _slabs(values), strict=True):
        ratio = slab.to(torch.float32, copy=True).div_(steps)
        if form == "int8":
            ratio.add_(noise(torch.empty_like(ratio))).floor_()
        target.copy_(ratio.clamp_(-_LARGEST[form], _LARGEST[form]))
    return values, steps


def restore(parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of ``dtype`` from what ``compress`` returned."""
    restored = torch.empty_like(parts[0], dtype=dtype).copy_(parts[0])
    return restored if len(parts) == 1 else restored.mul_(parts[1])


def _reduced(x: Tensor, scale: Scale) -> list[int]:
    """Return the dimensions that share a step size."""
    return [d for d in range(x.dim()) if d != 1 or scale == "tensor"]


def _scales(x: Tensor, scale: Scale) -> int:
    return x.shape[1] if scale == "channel" and x.dim() > 1 else 1


def _steps(x: Tensor, scale: Scale, largest: float) -> Tensor:
    dims = _reduced(x, scale)
    # Two reductions and no |x|, which would be a tensor of x's size.
    high, low = x.amax(dims, keepdim=True), x.amin(dims, keepdim=True)
    most = torch.maximum(high.abs_(), low.abs_()).to(torch.float32)
    # 0 / tiny is 0; and a channel that is not finite is NaN altogether, since what a NaN gives
    # as an int8 differs from device to device.
    steps = (most / largest).clamp_min_(torch.finfo(torch.float32).tiny)
    return steps.masked_fill_(~most.isfinite(), torch.nan)


def _slabs(x: Tensor) -> Iterator[Tensor]:
    """Yield views of ``x`` of some 16 million elements, cut along its longest other dimension."""
    if x.numel() <= _SLAB_ELEMENTS:
        yield x
        return
    lengths = {d: n for d, n in enumerate(x.shape) if d != 1} or {0: x.shape[0]}
    dim = max(lengths, key=lambda d: lengths[d])
    length = max(1, _SLAB_ELEMENTS * lengths[dim] // x.numel())
    for begin in range(0, lengths[dim], length):
        yield x.narrow(dim, begin, min(length, lengths[dim] - begin))
