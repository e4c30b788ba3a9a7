"""Kernels of the backward pass: sums, then the gradient of x written over z.

Five passes over the activation: z and dz are read for the sums, read again, and z is written.
dz is only ever read: autograd hands one tensor to all branches of a sum.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from memsave.kernels.launch import Kernel
from memsave.kernels.pieces import (
    WARPS,
    activation_gradient,
    dense,
    invert,
    on_device_of,
    tile_mask,
    tile_offsets,
)
from memsave.kernels.tiles import Tiling

__all__ = ["gradient_", "sums"]

_PARTIALS_AT_ONCE = 1024
_WARPS_TO_COMBINE = 4
# Three programs on a multiprocessor. Left alone, the compiler spills there for as many (float32,
# channels first), or leaves room for two (ELU). Hopper gets 64 registers and four programs, alone.
_REGISTERS_FOR_SUMS = 80


@Kernel
def _partial_sums(  # type: ignore[no-untyped-def]
    z,
    dz,
    partials,  # (2, rows, splits): sums of dy, and of dy * xhat
    weight,
    bias,
    eps,
    param,
    stride_n,
    stride_c,
    stride_s,
    dz_stride_n,
    dz_stride_c,
    dz_stride_s,
    channels,
    places,
    channel_blocks,
    tiles_per_sample,
    tiles_in_a_row,
    tiles_per_split,
    splits,
    all_partials,
    ACTIVATION: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    PLACE_BLOCK: tl.constexpr,
):
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    sample = block // channel_blocks
    channel = (block % channel_blocks) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    there = channel < channels
    steps = tl.minimum(tiles_per_split, tiles_in_a_row - split * tiles_per_split)
    shift = tl.zeros([CHANNEL_BLOCK], tl.float32)
    if bias is not None:
        shift += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)

    sum_dy = tl.zeros([CHANNEL_BLOCK, PLACE_BLOCK], tl.float32)
    sum_dy_y = tl.zeros([CHANNEL_BLOCK, PLACE_BLOCK], tl.float32)
    for step in range(steps):
        tile = split * tiles_per_split + step
        place = (tile % tiles_per_sample).to(tl.int64) * PLACE_BLOCK
        in_sample = sample + tile // tiles_per_sample
        mask = tile_mask(channel, place, channels, places, PLACE_BLOCK)
        at = tile_offsets(in_sample, channel, place, stride_n, stride_c, stride_s, PLACE_BLOCK)
        z_tile = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        at = tile_offsets(
            in_sample, channel, place, dz_stride_n, dz_stride_c, dz_stride_s, PLACE_BLOCK
        )
        dz_tile = tl.load(dz + at, mask=mask, other=0.0).to(tl.float32)
        dy = activation_gradient(dz_tile, z_tile, param, ACTIVATION)
        sum_dy += dy
        sum_dy_y += dy * (invert(z_tile, param, ACTIVATION) - shift[:, None])

    total = tl.sum(sum_dy_y, axis=1)  # of dy * scale * xhat
    if weight is not None:
        total /= tl.abs(tl.load(weight + channel, mask=there, other=1.0).to(tl.float32)) + eps
    where = partials + (sample * channels + channel).to(tl.int64) * splits + split
    tl.store(where, tl.sum(sum_dy, axis=1), mask=there)
    tl.store(where + all_partials, total, mask=there)


@Kernel
def _combine_sums(  # type: ignore[no-untyped-def]
    partials,
    d_weight,
    d_bias,
    means,  # (2, statistics): of scale * dy, and of scale * dy * xhat
    weight,
    eps,
    values,  # in a statistic
    channels,
    all_partials,
    rows_in_a_channel,
    rows_in_a_statistic,
    statistics,
    splits,
    BLOCK: tl.constexpr,
):
    # The first programs sum each channel's rows, for the parameters; the others each statistic's.
    program = tl.program_id(0)
    of_channel = program < channels
    statistic = program - channels
    first_row = tl.where(of_channel, program, statistic * rows_in_a_statistic)
    row_step = tl.where(of_channel, channels, 1)
    members = tl.where(of_channel, rows_in_a_channel, rows_in_a_statistic) * splits
    total_dy = tl.zeros([BLOCK], tl.float32)
    total_dy_xhat = tl.zeros([BLOCK], tl.float32)
    for first in range(0, members, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = first_row + i // splits * row_step
        scale = tl.full([BLOCK], 1.0, tl.float32)
        if weight is not None:
            w = tl.load(weight + row % channels, mask=i < members, other=0.0).to(tl.float32)
            scale = tl.where(of_channel, 1.0, tl.abs(w) + eps)
        at = partials + row.to(tl.int64) * splits + i % splits
        total_dy += scale * tl.load(at, mask=i < members, other=0.0)
        at += all_partials
        total_dy_xhat += scale * tl.load(at, mask=i < members, other=0.0)
    sum_dy = tl.sum(total_dy, axis=0)
    sum_dy_xhat = tl.sum(total_dy_xhat, axis=0)
    if of_channel:
        sign = 1.0
        if weight is not None:
            w = tl.load(weight + program).to(tl.float32)
            sign = tl.where(w < 0, -1.0, 1.0)
        tl.store(d_weight + program, sum_dy_xhat * sign)
        tl.store(d_bias + program, sum_dy)
    else:
        tl.store(means + statistic, sum_dy / values)
        tl.store(means + statistics + statistic, sum_dy_xhat / values)


@Kernel
def _gradient(  # type: ignore[no-untyped-def]
    z,
    dz,
    rstd,
    means,
    weight,
    bias,
    eps,
    param,
    stride_n,
    stride_c,
    stride_s,
    dz_stride_n,
    dz_stride_c,
    dz_stride_s,
    channels,
    places,
    channel_blocks,
    tiles_per_sample,
    rows_in_a_statistic,
    channels_in_rows,
    statistics,
    ACTIVATION: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    PLACE_BLOCK: tl.constexpr,
):
    # Backwards: what the sums' pass read last may still be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = (program % tiles_per_sample).to(tl.int64) * PLACE_BLOCK
    block = program // tiles_per_sample
    sample = block // channel_blocks
    channel = (block % channel_blocks) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    there = channel < channels
    statistic = (sample * channels_in_rows + channel) // rows_in_a_statistic

    scale = tl.full([CHANNEL_BLOCK], 1.0, tl.float32)
    if weight is not None:
        scale = tl.abs(tl.load(weight + channel, mask=there, other=1.0).to(tl.float32)) + eps
    r = tl.load(rstd + statistic, mask=there, other=0.0).to(tl.float32)
    mask = tile_mask(channel, place, channels, places, PLACE_BLOCK)
    z_at = tile_offsets(sample, channel, place, stride_n, stride_c, stride_s, PLACE_BLOCK)
    at = tile_offsets(sample, channel, place, dz_stride_n, dz_stride_c, dz_stride_s, PLACE_BLOCK)
    z_tile = tl.load(z + z_at, mask=mask, other=0.0).to(tl.float32)
    dz_tile = tl.load(dz + at, mask=mask, other=0.0).to(tl.float32)
    dx = activation_gradient(dz_tile, z_tile, param, ACTIVATION) * (scale * r)[:, None]
    if means is not None:
        y = invert(z_tile, param, ACTIVATION)
        if bias is not None:
            y -= tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)[:, None]
        mean_dy = tl.load(means + statistic, mask=there, other=0.0)
        mean_dy_xhat = tl.load(means + statistics + statistic, mask=there, other=0.0)
        dx -= (mean_dy * r)[:, None] + y * (mean_dy_xhat * r / scale)[:, None]
    tl.store(z + z_at, dx.to(z.dtype.element_ty), mask=mask)


def sums(
    z: Tensor,
    strides: tuple[int, int, int],
    dz: Tensor,
    dz_strides: tuple[int, int, int],
    cut: Tiling,
    partials: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    means: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> None:
    """Write the parameters' gradients, and the means that the gradient of x takes off.

    Shapes: ``partials`` (cut.partials,), ``d_weight`` and ``d_bias`` (C,), ``means``
        (2, cut.statistics): of scale * dy, and of scale * dy * xhat; all float32.
    """
    blocks = (cut.channel_block, cut.place_block)
    weight, bias = dense(weight), dense(bias)
    with on_device_of(z):
        _partial_sums.launch(
            cut.programs_of_partials,
            WARPS,
            (z, dz, partials, weight, bias),
            (eps, param),
            (*strides, *dz_strides, *cut.sizes, *cut.deal, activation, *blocks),
            registers=_REGISTERS_FOR_SUMS,
        )
        _combine_sums.launch(
            cut.channels + cut.statistics,
            _WARPS_TO_COMBINE,
            (partials, d_weight, d_bias, means, weight),
            (eps, cut.values_in_a_statistic),
            (
                cut.channels,
                cut.rows * cut.splits,
                cut.rows // cut.channels,
                cut.rows_in_a_statistic,
                cut.statistics,
                cut.splits,
                _PARTIALS_AT_ONCE,
            ),
        )


def gradient_(
    z: Tensor,
    strides: tuple[int, int, int],
    dz: Tensor,
    dz_strides: tuple[int, int, int],
    cut: Tiling,
    rstd: Tensor,
    means: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> None:
    """Overwrite ``z`` with the gradient of x; without ``means`` the statistics were given."""
    weight, bias = dense(weight), dense(bias)
    with on_device_of(z):
        _gradient.launch(
            cut.programs_of_tiles,
            WARPS,
            (z, dz, rstd, means, weight, bias),
            (eps, param),
            (
                *strides,
                *dz_strides,
                *cut.sizes,
                cut.rows_in_a_statistic,
                cut.channels_in_rows,
                cut.statistics,
                activation,
                cut.channel_block,
                cut.place_block,
            ),
        )
