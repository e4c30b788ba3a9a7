"""A simulator of PyTorch's CUDA caching allocator, for runs that no GPU has seen.

``simulate`` and ``needs_bytes`` take a run's events; ``CachingAllocator`` is driven call by call.
"""

from bench.predict.allocator.blocks import DEFAULT_POOL, Block, PoolId, PoolName
from bench.predict.allocator.caching import CachingAllocator, Counters, OutOfMemory
from bench.predict.allocator.restore import allocate_at, restore_range, restore_segment
from bench.predict.allocator.rules import LARGEST_SMALL_BYTES, round_size, segment_size
from bench.predict.allocator.simulate import (
    Event,
    PhasePeaks,
    SimulationResult,
    needs_bytes,
    simulate,
)
from bench.predict.allocator.store import PlaceSegment

__all__ = [
    "DEFAULT_POOL",
    "LARGEST_SMALL_BYTES",
    "Block",
    "CachingAllocator",
    "Counters",
    "Event",
    "OutOfMemory",
    "PhasePeaks",
    "PlaceSegment",
    "PoolId",
    "PoolName",
    "SimulationResult",
    "allocate_at",
    "needs_bytes",
    "restore_range",
    "restore_segment",
    "round_size",
    "segment_size",
    "simulate",
]
