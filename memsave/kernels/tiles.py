"""How a tensor (N, C, *) is cut into tiles: a function of shapes and strides alone.

Nothing here asks a device, so that a fake tensor is cut as a real one is, and a traced step shows
the very bytes that the kernels allocate. A tensor is seen as (N, C, S), S places of a sample, with
three strides. Statistics are taken over ``groups`` of channels of one sample each, or, where
``groups`` is None, over the batch, a channel at a time. A *row* is what is summed by one run of
tiles: a channel of the batch, or a channel of one sample.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Layout",
    "Strides",
    "Tiling",
    "collapse",
    "has_triton",
    "kernels_run",
    "kernels_serve",
    "lay_out",
    "tile",
]

# 256 threads of 16 elements: 16 bytes a load keep about 16 KiB a program in flight, which four to
# eight programs on a multiprocessor turn into more than the latency of HBM asks for.
TILE_ELEMENTS = 4096
# 132 multiprocessors (H100, H200) of 16 programs each: enough that the last wave hardly shows.
PROGRAMS = 2112
# Channels last: 64 channels of 2 bytes are a full 128-byte line.
CHANNELS_IN_A_ROW = 64

_SERVED = (torch.float32, torch.float16, torch.bfloat16)


Strides = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of tiles, and how many there are; what follows from them is worked out once.

    A row's tiles are dealt out to ``splits`` programs, ``tiles_per_split`` each, which leave one
    partial sum a row behind.
    """

    samples: int
    channels: int
    places: int
    groups: int | None
    channel_block: int
    place_block: int
    tiles_per_split: int

    @cached_property
    def channel_blocks(self) -> int:
        """Blocks of channels."""
        return math.ceil(self.channels / self.channel_block)

    @cached_property
    def tiles_per_sample(self) -> int:
        """Tiles along the places of one sample."""
        return math.ceil(self.places / self.place_block)

    @cached_property
    def samples_in_a_row(self) -> int:
        """Samples that are summed into one row."""
        return self.samples if self.groups is None else 1

    @cached_property
    def tiles_in_a_row(self) -> int:
        """Tiles that are summed into one row."""
        return self.samples_in_a_row * self.tiles_per_sample

    @cached_property
    def splits(self) -> int:
        """Programs, and so partial sums, a row."""
        return math.ceil(self.tiles_in_a_row / self.tiles_per_split)

    @cached_property
    def rows(self) -> int:
        """Rows: channels of the batch, or channels of each sample."""
        return self.channels if self.groups is None else self.samples * self.channels

    @cached_property
    def statistics(self) -> int:
        """Means, and variances, of the whole tensor."""
        return self.channels if self.groups is None else self.samples * self.groups

    @cached_property
    def rows_in_a_statistic(self) -> int:
        """Rows, next to each other, that share a mean."""
        return self.rows // max(1, self.statistics)

    @cached_property
    def values_in_a_statistic(self) -> int:
        """Values that one mean is taken over."""
        return self.rows_in_a_statistic * self.samples_in_a_row * self.places

    @cached_property
    def partials(self) -> int:
        """Numbers that a reduction needs for its partial sums: two a row and program."""
        return 2 * self.rows * self.splits

    @cached_property
    def programs_of_partials(self) -> int:
        """Programs of a kernel that leaves partial sums."""
        return self.splits * self.channel_blocks * (self.rows // max(1, self.channels))

    @cached_property
    def programs_of_tiles(self) -> int:
        """Programs of a kernel that takes one tile each."""
        return self.samples * self.channel_blocks * self.tiles_per_sample

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """What every kernel over tiles is told: channels, places, and how many tiles of both."""
        return self.channels, self.places, self.channel_blocks, self.tiles_per_sample

    @cached_property
    def deal(self) -> tuple[int, int, int, int]:
        """What kernels of partial sums are told: how tiles are dealt out; partials of a kind."""
        return self.tiles_in_a_row, self.tiles_per_split, self.splits, self.rows * self.splits

    @cached_property
    def missing(self) -> int:
        """Places that a sample's last tile lacks."""
        return self.tiles_per_sample * self.place_block - self.places

    @cached_property
    def channels_in_rows(self) -> int:
        """How many rows further the next sample's begin: 0 where rows are the batch's."""
        return 0 if self.groups is None else self.channels


def tile(shape: Sequence[int], groups: int | None, *strides: Strides) -> Tiling:
    """Cut tensors of ``shape`` (N, C, *), whose collapsed strides are ``strides``, alike.

    The first one's strides decide on the form of a tile.
    """
    samples, channels, places = shape[0], shape[1], math.prod(shape[2:])
    if groups is None and all(n == places * s for n, _, s in strides):
        samples, places = 1, samples * places  # the batch is one run of places
    channel_block, place_block = _blocks(channels, places, strides[0])
    tiles = (samples if groups is None else 1) * math.ceil(places / place_block)
    rows_at_once = math.ceil(channels / channel_block) * (1 if groups is None else samples)
    wanted = min(tiles, math.ceil(PROGRAMS / max(1, rows_at_once)))
    return Tiling(
        samples=samples,
        channels=channels,
        places=places,
        groups=groups,
        channel_block=channel_block,
        place_block=place_block,
        tiles_per_split=math.ceil(tiles / max(1, wanted)) or 1,
    )


def collapse(x: Tensor) -> Strides | None:
    """Return the strides of ``x`` (N, C, *) seen as (N, C, S), or None if no such view exists.

    It does for contiguous and channels-last tensors, for slices of them along samples and
    channels, and for expanded ones.
    """
    return _collapse(x.shape, x.stride())


def _collapse(shape: Sequence[int], strides: Sequence[int]) -> Strides | None:
    sides = [(n, s) for n, s in zip(shape[2:], strides[2:], strict=True) if n != 1]
    if any(a != b * n for (_, a), (n, b) in pairwise(sides)):
        return None
    return strides[0], strides[1], sides[-1][1] if sides else strides[0]


class Layout(NamedTuple):
    """How the kernels see a tensor, and its gradient if there is one: both cut alike."""

    cut: Tiling
    strides: Strides
    dz_strides: Strides


def lay_out(groups: int | None, x: Tensor, dz: Tensor | None = None) -> Layout | None:
    """Return how the kernels see ``x``, and ``dz`` if given; None if they cannot take one of them.

    Without ``dz``, its strides are x's.
    """
    dz = x if dz is None else dz
    key = (x.shape, groups, x.dtype, x.stride(), dz.dtype, dz.stride(), dz is x)
    # A step lays out the same tensors again and again.
    try:
        return _remembered_layout(*key)
    except TypeError:  # a compiler's symbolic sizes have no hash
        return _lay_out(*key)


def _lay_out(
    shape: torch.Size,
    groups: int | None,
    dtype: torch.dtype,
    strides: Sequence[int],
    dz_dtype: torch.dtype,
    dz_strides: Sequence[int],
    alone: bool,
) -> Layout | None:
    at, dz_at = _collapse(shape, strides), _collapse(shape, dz_strides)
    if at is None or dz_at is None or dtype not in _SERVED or dz_dtype not in _SERVED:
        return None
    return Layout(tile(shape, groups, at, *([] if alone else [dz_at])), at, dz_at)


_remembered_layout = lru_cache(maxsize=1024)(_lay_out)


def kernels_serve(x: Tensor) -> bool:
    """Whether the kernels can take ``x``, wherever it is: its type, and its strides collapse.

    float64 is left to the plain maths: nobody trains in it.
    """
    return x.dtype in _SERVED and collapse(x) is not None


def kernels_run(x: Tensor) -> bool:
    """Whether ``x`` is on a device that the kernels run on, and they can take it."""
    return x.device.type == "cuda" and kernels_serve(x) and has_triton()


def _blocks(channels: int, places: int, strides: Strides) -> tuple[int, int]:
    """Return the channels and places of a tile, powers of two."""
    if strides[1] == 1 and strides[2] != 1 and channels > 1:  # channels lie side by side
        channel_block = min(_power_of_two(channels), CHANNELS_IN_A_ROW)
        return channel_block, min(_power_of_two(places), TILE_ELEMENTS // channel_block)
    place_block = min(_power_of_two(places), TILE_ELEMENTS)
    return min(_power_of_two(channels), TILE_ELEMENTS // place_block), place_block


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None
