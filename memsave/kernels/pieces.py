"""What the kernels share: where a tile lies in memory, and the activations, in float32.

A value in a tile is at [channel, place]. Offsets are 64-bit, since one activation of a 3D network
may pass 2^31 elements. Of what is compared with a string, the compiler sees one branch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "WARPS",
    "activate",
    "activation_gradient",
    "dense",
    "invert",
    "jit",
    "on_device_of",
    "tile_mask",
    "tile_offsets",
    "values_in_split",
]

WARPS = 8  # 256 threads for the 4,096 elements of a tile

_NOTHING_TO_CHANGE = nullcontext()

jit: Callable[[Callable[..., Any]], Any] = triton.jit  # triton ships no types

# Near 0, exp(y) - 1 and log(1 + r) lose what is asked for; there a short series is exact to
# float32's rounding. The compiler's exp and log are within 2 units elsewhere.
_SERIES_OF_EXP = tl.constexpr(-0.35)
_SERIES_OF_LOG = tl.constexpr(-0.25)
# Rounding takes ELU to exactly -alpha, whose y would be -inf; the nearest above it has one.
_ABOVE_MINUS_ONE = tl.constexpr(-1 + 2**-24)


@jit
def tile_offsets(  # type: ignore[no-untyped-def]
    sample, channel, first_place, stride_n, stride_c, stride_s, PLACE_BLOCK: tl.constexpr
):
    """Return the offsets of a tile's elements from the tensor's first."""
    place = first_place.to(tl.int64) + tl.arange(0, PLACE_BLOCK)
    of_channels = channel.to(tl.int64) * stride_c
    return sample.to(tl.int64) * stride_n + of_channels[:, None] + (place * stride_s)[None, :]


@jit
def tile_mask(channel, first_place, channels, places, PLACE_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which elements of a tile exist."""
    place = first_place.to(tl.int64) + tl.arange(0, PLACE_BLOCK)
    return (channel < channels)[:, None] & (place < places)[None, :]


@jit
def values_in_split(  # type: ignore[no-untyped-def]
    split, tiles_per_split, tiles_in_a_row, tiles_per_sample, missing, PLACE_BLOCK: tl.constexpr
):
    """Return how many values of a row ``split`` sums; only a sample's last tile is short."""
    first = split.to(tl.int64) * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tiles_in_a_row)
    short_tiles = end // tiles_per_sample - first // tiles_per_sample
    return (end - first) * PLACE_BLOCK - short_tiles * missing


@jit
def activate(y, param, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return act(y)."""
    if ACTIVATION == "leaky_relu":
        y = tl.where(y > 0, y, y * param)
    elif ACTIVATION == "elu":
        below = tl.minimum(y, 0.0)
        near = tl.maximum(below, _SERIES_OF_EXP)
        series = 1 + near / 5 * (1 + near / 6 * (1 + near / 7 * (1 + near / 8)))
        series = near * (1 + near / 2 * (1 + near / 3 * (1 + near / 4 * series)))
        negative = tl.where(below > _SERIES_OF_EXP, series, tl.exp(below) - 1)
        y = tl.where(y > 0, y, negative * param)
    return y


@jit
def invert(z, param, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the y of z = act(y)."""
    if ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * (1.0 / param))
    elif ACTIVATION == "elu":
        ratio = tl.maximum(tl.minimum(z / param, 0.0), _ABOVE_MINUS_ONE)
        near = tl.maximum(ratio, _SERIES_OF_LOG)
        t = near / (2 + near)  # log(1 + r) = 2 artanh(r / (2 + r))
        square = t * t
        series = 1 + square * (1.0 / 3 + square * (0.2 + square * (1.0 / 7 + square / 9)))
        negative = tl.where(ratio > _SERIES_OF_LOG, 2 * t * series, tl.log(1 + ratio))
        z = tl.where(z > 0, z, negative)
    return z


@jit
def activation_gradient(dz, z, param, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the gradient of y."""
    if ACTIVATION == "leaky_relu":
        dz = tl.where(z > 0, dz, dz * param)
    elif ACTIVATION == "elu":
        dz = tl.where(z > 0, dz, dz * (z + param))
    return dz


def dense(tensor: Tensor | None) -> Tensor | None:
    """Return ``tensor`` with its values side by side, as kernels read them: itself, or a copy."""
    return None if tensor is None else tensor.contiguous()


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return the scope in which a kernel is launched for ``x``: Triton asks for current device."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING_TO_CHANGE
    return torch.cuda.device(x.device)
