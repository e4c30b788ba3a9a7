"""Sizes: how a request is rounded, which pool it goes to, how large its segment is.

Source: torch 2.x, c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp, whose
constants these are.
"""

from __future__ import annotations

from bench.predict.alloc_conf import ROUNDUP_INTERVALS, AllocatorSettings
from bench.units import MIB

__all__ = [
    "LARGEST_SMALL_BYTES",
    "MIN_BLOCK_BYTES",
    "SEGMENT_ROUNDING_BYTES",
    "SMALL_SEGMENT_BYTES",
    "round_size",
    "segment_size",
]

MIN_BLOCK_BYTES = 512  # every block is a multiple of this
LARGEST_SMALL_BYTES = MIB  # rounded requests up to here live in the small pool
SMALL_SEGMENT_BYTES = 2 * MIB  # the small pool's segments and pages
SEGMENT_ROUNDING_BYTES = 2 * MIB  # CUDA's driver hands out granules of as much
_OWN_SEGMENT_FROM_BYTES = 10 * MIB  # below, large requests share a segment
_FIRST_INTERVAL_BITS = MIB.bit_length()


def round_size(size_bytes: int, settings: AllocatorSettings) -> int:
    """Return the bytes that a request of ``size_bytes`` > 0 takes before any block is chosen."""
    divisions = settings.roundup_power2_divisions
    if divisions and size_bytes >= MIN_BLOCK_BYTES:
        interval = max(size_bytes.bit_length() - _FIRST_INTERVAL_BITS, 0)
        division = divisions[min(interval, ROUNDUP_INTERVALS - 1)]
        if division > 1 and size_bytes > MIN_BLOCK_BYTES * division:
            return _next_division(size_bytes, division)
    return (size_bytes + MIN_BLOCK_BYTES - 1) // MIN_BLOCK_BYTES * MIN_BLOCK_BYTES


def _next_division(size_bytes: int, divisions: int) -> int:
    """Round up to one of ``divisions`` equal steps between two powers of two."""
    power = 1 << (size_bytes.bit_length() - 1)
    if size_bytes == power:
        return size_bytes
    step = power >> (divisions.bit_length() - 1)
    return (size_bytes + step - 1) // step * step if step else 2 * power


def segment_size(rounded_bytes: int, settings: AllocatorSettings) -> int:
    """Return the size of the segment that a rounded request asks the driver for."""
    if rounded_bytes <= LARGEST_SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded_bytes < _OWN_SEGMENT_FROM_BYTES:
        return settings.large_segment_size_bytes
    step = SEGMENT_ROUNDING_BYTES
    return (rounded_bytes + step - 1) // step * step
