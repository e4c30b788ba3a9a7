"""Kernels of the forward pass: statistics, then norm and activation over their input.

Three passes over the activation: one read for the statistics, a read and a write.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from memsave.kernels.launch import Kernel
from memsave.kernels.pieces import (
    WARPS,
    activate,
    dense,
    on_device_of,
    tile_mask,
    tile_offsets,
    values_in_split,
)
from memsave.kernels.tiles import Tiling

__all__ = ["normalise_", "statistics"]

_PARTIALS_AT_ONCE = 1024
_WARPS_TO_COMBINE = 4


@Kernel
def _partial_statistics(  # type: ignore[no-untyped-def]
    x,
    partials,  # (2, rows, splits): means, sums of squared deviations from them
    stride_n,
    stride_c,
    stride_s,
    channels,
    places,
    channel_blocks,
    tiles_per_sample,
    tiles_in_a_row,
    tiles_per_split,
    splits,
    all_partials,
    missing,
    CHANNEL_BLOCK: tl.constexpr,
    PLACE_BLOCK: tl.constexpr,
):
    # Sums of x - k and of its square, k being the first tile's mean: however far the values lie
    # from 0, the variance is lost only to the extent that k misses the program's own mean, and
    # that is part of the variance.
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    sample = block // channel_blocks
    channel = (block % channel_blocks) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    tile = split * tiles_per_split
    steps = tl.minimum(tiles_per_split, tiles_in_a_row - tile)

    place = (tile % tiles_per_sample).to(tl.int64) * PLACE_BLOCK
    in_sample = sample + tile // tiles_per_sample
    offsets = tile_offsets(in_sample, channel, place, stride_n, stride_c, stride_s, PLACE_BLOCK)
    mask = tile_mask(channel, place, channels, places, PLACE_BLOCK)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    in_first = tl.minimum(places - place, PLACE_BLOCK).to(tl.float32)
    first_mean = tl.sum(values, axis=1) / in_first
    first = tl.where(mask, values - first_mean[:, None], 0.0)
    sums, squares = first, first * first
    for step in range(1, steps):
        tile = split * tiles_per_split + step
        place = (tile % tiles_per_sample).to(tl.int64) * PLACE_BLOCK
        in_sample = sample + tile // tiles_per_sample
        offsets = tile_offsets(in_sample, channel, place, stride_n, stride_c, stride_s, PLACE_BLOCK)
        mask = tile_mask(channel, place, channels, places, PLACE_BLOCK)
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        values = tl.where(mask, values - first_mean[:, None], 0.0)
        sums += values
        squares += values * values

    count = values_in_split(
        split, tiles_per_split, tiles_in_a_row, tiles_per_sample, missing, PLACE_BLOCK
    ).to(tl.float32)
    total = tl.sum(sums, axis=1)
    spread = tl.maximum(tl.sum(squares, axis=1) - total * total / count, 0.0)
    where = partials + (sample * channels + channel).to(tl.int64) * splits + split
    tl.store(where, first_mean + total / count, mask=channel < channels)
    tl.store(where + all_partials, spread, mask=channel < channels)


@Kernel
def _combine_statistics(  # type: ignore[no-untyped-def]
    partials,
    mean,
    spread,  # 1/std, or the variance
    running_mean,
    running_var,
    momentum,
    eps,
    values,  # in a statistic
    members,  # partials in a statistic, next to each other
    tiles_in_a_row,
    tiles_per_split,
    splits,
    all_partials,
    missing,  # places that a sample's last tile lacks
    tiles_per_sample,
    PLACE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    AS_VARIANCE: tl.constexpr,
):
    statistic = tl.program_id(0)
    start = partials + statistic.to(tl.int64) * members
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, members, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = values_in_split(
            i % splits, tiles_per_split, tiles_in_a_row, tiles_per_sample, missing, PLACE_BLOCK
        ).to(tl.float32)
        total += count * tl.load(start + i, mask=i < members, other=0.0)
    m = tl.sum(total, axis=0) / values
    # The means may be huge and close together: what they miss m by is summed, not their squares.
    deviation = tl.zeros([BLOCK], tl.float32)
    missed = tl.zeros([BLOCK], tl.float32)
    for first in range(0, members, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = values_in_split(
            i % splits, tiles_per_split, tiles_in_a_row, tiles_per_sample, missing, PLACE_BLOCK
        ).to(tl.float32)
        off = tl.load(start + i, mask=i < members, other=0.0) - m
        off = tl.where(i < members, off, 0.0)
        missed += count * off
        deviation += tl.load(start + all_partials + i, mask=i < members, other=0.0)
        deviation += count * off * off
    correction = tl.sum(missed, axis=0) / values
    m += correction
    variance = tl.sum(deviation, axis=0) / values - correction * correction
    variance = tl.maximum(variance, 0.0)
    tl.store(mean + statistic, m)
    if AS_VARIANCE:
        tl.store(spread + statistic, variance)
    else:
        tl.store(spread + statistic, 1 / tl.sqrt(variance + eps))
    if running_mean is not None:
        old = tl.load(running_mean + statistic).to(tl.float32)
        new = (1 - momentum) * old + momentum * m
        tl.store(running_mean + statistic, new.to(running_mean.dtype.element_ty))
    if running_var is not None:
        old = tl.load(running_var + statistic).to(tl.float32)
        new = (1 - momentum) * old + momentum * variance * (values / (values - 1.0))
        tl.store(running_var + statistic, new.to(running_var.dtype.element_ty))


@Kernel
def _normalise(  # type: ignore[no-untyped-def]
    x,
    mean,
    rstd,
    weight,
    bias,
    eps,
    param,
    stride_n,
    stride_c,
    stride_s,
    channels,
    places,
    channel_blocks,
    tiles_per_sample,
    rows_in_a_statistic,
    channels_in_rows,
    ACTIVATION: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    PLACE_BLOCK: tl.constexpr,
):
    # Backwards: what the statistics' pass read last may still be in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = (program % tiles_per_sample).to(tl.int64) * PLACE_BLOCK
    block = program // tiles_per_sample
    sample = block // channel_blocks
    channel = (block % channel_blocks) * CHANNEL_BLOCK + tl.arange(0, CHANNEL_BLOCK)
    there = channel < channels
    statistic = (sample * channels_in_rows + channel) // rows_in_a_statistic

    scale = tl.load(rstd + statistic, mask=there, other=0.0).to(tl.float32)
    if weight is not None:
        scale *= tl.abs(tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)) + eps
    centre = tl.load(mean + statistic, mask=there, other=0.0).to(tl.float32)
    offsets = tile_offsets(sample, channel, place, stride_n, stride_c, stride_s, PLACE_BLOCK)
    mask = tile_mask(channel, place, channels, places, PLACE_BLOCK)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    y = (values - centre[:, None]) * scale[:, None]
    if bias is not None:
        y += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)[:, None]
    z = activate(y, param, ACTIVATION)
    tl.store(x + offsets, z.to(x.dtype.element_ty), mask=mask)


def statistics(
    x: Tensor,
    strides: tuple[int, int, int],
    cut: Tiling,
    partials: Tensor,
    mean: Tensor,
    spread: Tensor,
    eps: float = 0.0,
    momentum: float = 0.0,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    as_variance: bool = False,
) -> None:
    """Write mean and 1/std of each statistic (or its variance), and update the running ones.

    Shapes: ``x`` with collapsed ``strides``, cut as ``cut``; ``partials`` (cut.partials,),
        ``mean`` and ``spread`` (cut.statistics,), float32; running ones (C,), any type.
    """
    blocks = (cut.channel_block, cut.place_block)
    written_mean, written_var = dense(running_mean), dense(running_var)
    with on_device_of(x):
        _partial_statistics.launch(
            cut.programs_of_partials,
            WARPS,
            (x, partials),
            (),
            (*strides, *cut.sizes, *cut.deal, cut.missing, *blocks),
        )
        _combine_statistics.launch(
            cut.statistics,
            _WARPS_TO_COMBINE,
            (partials, mean, spread, written_mean, written_var),
            (momentum, eps, cut.values_in_a_statistic),
            (
                cut.rows_in_a_statistic * cut.splits,
                *cut.deal,
                cut.missing,
                cut.tiles_per_sample,
                cut.place_block,
                _PARTIALS_AT_ONCE,
                as_variance,
            ),
        )
    for kept, written in ((running_mean, written_mean), (running_var, written_var)):
        if kept is not None and written is not None and written is not kept:
            kept.copy_(written)


def normalise_(
    x: Tensor,
    strides: tuple[int, int, int],
    cut: Tiling,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> None:
    """Overwrite ``x`` with ``act((|weight| + eps) * (x - mean) * rstd + bias)``."""
    weight, bias = dense(weight), dense(bias)
    with on_device_of(x):
        _normalise.launch(
            cut.programs_of_tiles,
            WARPS,
            (x, mean.contiguous(), rstd, weight, bias),
            (eps, param),
            (
                *strides,
                *cut.sizes,
                cut.rows_in_a_statistic,
                cut.channels_in_rows,
                activation,
                cut.channel_block,
                cut.place_block,
            ),
        )
