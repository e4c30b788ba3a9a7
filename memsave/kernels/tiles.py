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

import torch
from torch import Tensor

__all__ = ["Tiling", "collapse", "kernels_run", "kernels_serve", "tile"]

# 256 threads of 16 elements: 16 bytes a load keep about 16 KiB a program in flight, which four to
# eight programs on a multiprocessor turn into more than the latency of HBM asks for.
TILE_ELEMENTS = 4096
# 132 multiprocessors (H100, H200) of 16 programs each: enough that the last wave hardly shows.
PROGRAMS = 2112
# Channels last: 64 channels of 2 bytes are a full 128-byte line.
CHANNELS_IN_A_ROW = 64

_SERVED = (torch.float32, torch.float16, torch.bfloat16)


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


def tile(shape: Sequence[int], groups: int | None, *strides: tuple[int, int, int]) -> Tiling:
    """Cut tensors of ``shape`` (N, C, *), whose collapsed strides are ``strides``, alike.

    The first one's strides decide on the form of a tile.
    """
    # A step cuts the same shapes again and again. A compiler's symbolic sizes are not remembered.
    cut = _remembered if all(type(n) is int for n in shape) else _tile
    return cut(tuple(shape), groups, strides)


def _tile(
    shape: tuple[int, ...], groups: int | None, strides: tuple[tuple[int, int, int], ...]
) -> Tiling:
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


_remembered = lru_cache(maxsize=1024)(_tile)


def collapse(x: Tensor) -> tuple[int, int, int] | None:
    """Return the strides of ``x`` (N, C, *) seen as (N, C, S), or None if no such view exists.

    It does for contiguous and channels-last tensors, for slices of them along samples and
    channels, and for expanded ones.
    """
    sides = [(n, s) for n, s in zip(x.shape[2:], x.stride()[2:], strict=True) if n != 1]
    if any(a != b * n for (_, a), (n, b) in pairwise(sides)):
        return None
    return x.stride(0), x.stride(1), sides[-1][1] if sides else x.stride(0)


def kernels_serve(x: Tensor) -> bool:
    """Whether the kernels can take ``x``, wherever it is: its type, and its strides collapse.

    float64 is left to the plain maths: nobody trains in it.
    """
    return x.dtype in _SERVED and collapse(x) is not None


def kernels_run(x: Tensor) -> bool:
    """Whether ``x`` is on a device that the kernels run on, and they can take it."""
    return x.device.type == "cuda" and kernels_serve(x) and _has_triton()


def _blocks(channels: int, places: int, strides: tuple[int, int, int]) -> tuple[int, int]:
    """Return the channels and places of a tile, powers of two."""
    if strides[1] == 1 and strides[2] != 1 and channels > 1:  # channels lie side by side
        channel_block = min(_power_of_two(channels), CHANNELS_IN_A_ROW)
        return channel_block, min(_power_of_two(places), TILE_ELEMENTS // channel_block)
    place_block = min(_power_of_two(places), TILE_ELEMENTS)
    return min(_power_of_two(channels), TILE_ELEMENTS // place_block), place_block


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
