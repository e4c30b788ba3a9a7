"""The room that CUDA's radix sort takes for pairs of 64-bit numbers, as torch's CUDA build asks it.

Torch sorts by CUB where it adds up gradients at repeated indices. CUB answers on the host how many
bytes it wants: nothing to speak of where one block sorts all; else counters for each pass over the
bits, and, where one pass does not do, a second copy of the numbers. Exact for torch 2.11 and 2.13
built for CUDA 13, found by asking them for 28 lengths on cards of seven compute capabilities.
"""

from __future__ import annotations

from typing import Final

from bench.predict.traced_card import capability

__all__ = ["radix_sort_bytes"]

_ONE_BLOCK: Final = 2304  # pairs that a single block sorts
_BITS: Final = 8  # of a pass
_DIGITS: Final = 1 << _BITS
_ALIGNED: Final = 256
_LONGEST: Final = (1 << 28) - 1  # pairs that are sorted by one launch


def radix_sort_bytes(pairs: int, largest_key: int) -> int:
    """Return the bytes of the room to sort ``pairs`` of int64 by keys from 0 to ``largest_key``."""
    if pairs <= _ONE_BLOCK:
        return 1
    tile = _tile()
    passes = -(-max(1, largest_key.bit_length()) // _BITS)
    portion = _LONGEST // tile * tile
    portions = -(-pairs // portion)
    copy = 0 if passes == 1 else 8 * pairs
    blocks = -(-min(pairs, portion) // tile)
    parts = (
        portions * passes * _DIGITS * 8,
        blocks * _DIGITS * 4,
        copy,
        copy,
        4 * passes * portions,
    )
    return sum(-(-part // _ALIGNED) * _ALIGNED for part in parts) + _ALIGNED - 1


def _tile() -> int:
    """Return how many pairs a block takes in one pass."""
    if capability() >= (9, 0):
        return 4608
    return 3840 if capability() >= (8, 0) else 2816
