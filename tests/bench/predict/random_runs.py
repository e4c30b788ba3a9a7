"""Random runs through the reference allocator, and the settings to run them under."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from bench.predict.alloc_conf import AllocatorSettings
from tests.bench.predict.reference_allocator import (
    MIB,
    NO_LIMIT,
    Piece,
    ReferenceAllocator,
    ReferenceOutOfMemory,
)

Action = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings and a capacity, for either allocator."""

    settings: AllocatorSettings = field(default_factory=AllocatorSettings)
    capacity: int | None = None

    def reference(self) -> ReferenceAllocator:
        s = self.settings
        total = self.capacity
        shared = total is not None and s.per_process_memory_fraction < 1
        return ReferenceAllocator(
            capacity=NO_LIMIT if total is None else total,
            range_bytes=1 << 40 if total is None else total + total // 8,
            max_split=s.max_split_size_bytes or NO_LIMIT,
            max_rounding=s.max_non_split_rounding_bytes,
            gc_threshold=s.garbage_collection_threshold,
            allowed=int(s.per_process_memory_fraction * (total or 0)) if shared else None,
            fraction=s.per_process_memory_fraction,
            divisions=s.roundup_power2_divisions,
            expandable=s.expandable_segments,
            large_segment=s.large_segment_size_bytes,
        )


SETUPS = {
    "default": Setup(),
    "tight": Setup(capacity=160 * MIB),
    "expandable": Setup(settings=AllocatorSettings(expandable_segments=True)),
    "expandable_tight": Setup(
        settings=AllocatorSettings(expandable_segments=True), capacity=170 * MIB
    ),
    "expandable_small_pages": Setup(
        settings=AllocatorSettings(
            expandable_segments=True,
            large_segment_size_bytes=12 * MIB,
            max_non_split_rounding_bytes=12 * MIB,
        ),
        capacity=160 * MIB,
    ),
    "max_split": Setup(
        settings=AllocatorSettings(max_split_size_bytes=20 * MIB), capacity=200 * MIB
    ),
    "max_split_rounding": Setup(
        settings=AllocatorSettings(
            max_split_size_bytes=24 * MIB, max_non_split_rounding_bytes=30 * MIB
        ),
        capacity=200 * MIB,
    ),
    "max_split_expandable": Setup(
        settings=AllocatorSettings(max_split_size_bytes=32 * MIB, expandable_segments=True),
        capacity=200 * MIB,
    ),
    "roundup": Setup(settings=AllocatorSettings(roundup_power2_divisions=(4,) * 16)),
    "roundup_by_interval": Setup(
        settings=AllocatorSettings(roundup_power2_divisions=(8, 2, 0, 1, 16, *(4,) * 11)),
        capacity=220 * MIB,
    ),
    "large_segments": Setup(
        settings=AllocatorSettings(
            large_segment_size_bytes=32 * MIB, max_non_split_rounding_bytes=32 * MIB
        ),
        capacity=200 * MIB,
    ),
    "collecting": Setup(
        settings=AllocatorSettings(
            garbage_collection_threshold=0.5, per_process_memory_fraction=0.75
        ),
        capacity=280 * MIB,
    ),
    "collecting_max_split": Setup(
        settings=AllocatorSettings(
            garbage_collection_threshold=0.4,
            per_process_memory_fraction=0.9,
            max_split_size_bytes=24 * MIB,
        ),
        capacity=240 * MIB,
    ),
}


def random_size(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.3:
        return rng.randint(1, 5000)
    if kind < 0.5:
        return rng.choice([MIB - 512, MIB, MIB + 1, MIB + 512, 700_000, 300_000])
    if kind < 0.8:
        return rng.randint(MIB + 1, 12 * MIB)
    return rng.choice([10 * MIB - 512, 10 * MIB, 11 * MIB + MIB // 2, 19 * MIB, 24 * MIB, 41 * MIB])


def random_actions(seed: int, count: int, streams: int = 2) -> list[Action]:
    """("alloc", size, stream), ("free", which), ("free_later", which, stream), ..."""
    rng = random.Random(seed)
    actions: list[Action] = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.52:
            actions.append(("alloc", random_size(rng), rng.randrange(streams)))
        elif kind < 0.90:
            actions.append(("free", rng.random()))
        elif kind < 0.95:
            actions.append(("free_later", rng.random(), rng.randrange(streams)))
        elif kind < 0.985:
            actions.append(("stream_done", rng.randrange(streams)))
        else:
            actions.append(("empty_cache",))
    return actions


def run_reference(reference: ReferenceAllocator, actions: list[Action]) -> None:
    """Run actions; a request that does not fit is given up, as a program would catch it."""
    live: list[Piece] = []
    for action in actions:
        if action[0] == "alloc":
            try:
                live.append(reference.malloc(action[1], action[2]))
            except ReferenceOutOfMemory:
                continue
        elif action[0] in ("free", "free_later") and live:
            piece = live.pop(int(action[1] * len(live)))
            reference.free(piece, {action[2]} if action[0] == "free_later" else None)
        elif action[0] == "stream_done":
            reference.stream_done(action[1])
        elif action[0] == "empty_cache":
            reference.release_all()
