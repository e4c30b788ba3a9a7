"""The buffer in which the blocks of a CUDA reduction leave their parts, worked out from the shapes.

Where few results come of many numbers, several blocks share a result: each leaves its part in
global memory and the last one adds up; counters beside the parts say which is the last. Small for a
sum over the sides of a contiguous volume; for a sum over rows, as of a linear layer's bias
gradient, it may be larger than what is summed.

Follows how torch lays a reduction out over the GPU (seen on 2.11 and 2.13): dimensions that are
reduced come first, neighbours that lie on end are taken as one, threads go to what lies closest.
How many multiprocessors there are, and threads in each, is the traced card's. It counts only where
more than some 16,000 results lie side by side, or where few results take very many numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from bench.predict.traced_card import multiprocessors, resident_threads

__all__ = ["reduction_buffers"]

_MOST_THREADS = 512  # of a block, by all results of its widest loads
_WARP = 32
_LEAST_VALUES, _MOST_VALUES = 16, 256  # for each thread
_INDEXABLE = 2**31 - 1
_COUNTER_BYTES = 4  # for each column of blocks


@dataclass(slots=True)
class _Layout:
    """The input's dimensions, innermost first, the reduced ones before the others."""

    sizes: list[int]
    strides: list[int]  # of the input, in elements
    reduced: int  # how many of them are


def reduction_buffers(
    source: Tensor, dims: tuple[int, ...], part_bytes: int, *, vector: int = 4
) -> tuple[int, ...]:
    """Return the bytes of the parts and of the counters of a reduction over ``dims``, or nothing.

    Of all dimensions where ``dims`` is empty.

    ``part_bytes``: of what is kept for a result on the way, as 4 for a sum in float32.
    ``vector``: how many numbers a thread loads at once where it can.
    """
    layout = _laid_out(source, dims)
    inputs = prod(layout.sizes[: layout.reduced])
    outputs = prod(layout.sizes[layout.reduced :])
    if inputs <= 1 or outputs == 0 or source.numel() * source.element_size() > _INDEXABLE:
        return ()
    inner = _reduces_inner(layout)
    lanes = 1 if inner else _output_lanes(source, layout)
    fastest, other = (inputs, outputs) if inner else (outputs // lanes, inputs)
    if inner and len(layout.sizes) == 1 and layout.strides[0] == 1 and inputs > 128:
        fastest //= vector
    width, height = _block(fastest, other, _MOST_THREADS // lanes)
    along = width if inner else 1  # threads, then blocks, that share a result
    if _parts(inputs, along) >= min(height * 16, _MOST_VALUES):
        along, shared, side = along * height, True, 1 if inner else width
    else:
        shared, side = False, height if inner else width * height
    values = _parts(inputs, along)
    grid = _parts(outputs // lanes, side)
    blocks = _blocks_of_a_result(values, grid, width * height) if shared else 1
    if blocks == 1:
        return ()
    parts = part_bytes * outputs * blocks * (1 if inner else width * lanes)
    return parts, _COUNTER_BYTES * grid


def _blocks_of_a_result(values: int, grid: int, threads: int) -> int:
    room = multiprocessors() * (resident_threads() // threads)
    if values < _MOST_VALUES or grid > room:
        return 1
    wanted = min(_parts(room, grid), _parts(values, _LEAST_VALUES))
    return max(wanted, _parts(values, _MOST_VALUES))


def _block(fastest: int, other: int, most: int) -> tuple[int, int]:
    """Return a block's width and height in threads."""
    across, along = (min(_power_of_two(n), most) if n < most else most for n in (fastest, other))
    width = min(across, _WARP)
    height = min(along, most // width)
    return min(across, most // height), height


def _laid_out(source: Tensor, dims: tuple[int, ...]) -> _Layout:
    rank = source.dim()
    reduced = {d % rank for d in dims} if dims and rank else set(range(rank))
    wide = [d for d in range(rank) if source.shape[d] != 1]
    # The result is contiguous, and what is kept goes by how the result lies.
    ordered = sorted((d for d in wide if d in reduced), key=source.stride)
    ordered += [d for d in reversed(wide) if d not in reduced]
    sides = [(d not in reduced, source.stride(d), source.shape[d]) for d in ordered]
    sizes: list[int] = []
    strides: list[int] = []
    count = 0
    kept_before = None
    for kept, stride, size in sides:
        if sizes and kept == kept_before and strides[-1] * sizes[-1] == stride:
            sizes[-1] *= size
            continue
        sizes.append(size)
        strides.append(stride)
        count += not kept
        kept_before = kept
    return _Layout(sizes, strides, count)


def _reduces_inner(layout: _Layout) -> bool:
    if layout.reduced == len(layout.sizes):
        return True
    return layout.reduced > 0 and layout.strides[0] < layout.strides[layout.reduced]


def _output_lanes(source: Tensor, layout: _Layout) -> int:
    """Return how many results a thread works on, which lie side by side: 4, 2 or 1."""
    if layout.strides[layout.reduced] != 1:
        return 1
    lanes = 4
    others = [s for d, s in enumerate(layout.strides) if d != layout.reduced]
    for number in (source.storage_offset(), layout.sizes[layout.reduced], *others):
        while number % lanes:
            lanes //= 2
    return lanes


def _power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1) if number else 1


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)
