"""A program through the simulator, held against what PyTorch's allocator answered to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.predict.alloc_conf import parse_alloc_conf
from bench.predict.allocator import DEFAULT_POOL, Block, CachingAllocator, OutOfMemory
from bench.predict.allocator.blocks import FREE, UNMAPPED, Pool
from bench.predict.replay import replay
from bench.predict.trace_file import read_trace
from tests.stand_in.allocator_setups import MIB, Setup

__all__ = ["NAMES", "Simulated", "first_difference", "replay_difference"]

_GRANULE = 2 * MIB
NAMES = (
    "address",
    *("allocated", "requested", "active", "reserved"),
    *("peak allocated", "peak requested", "peak active", "peak reserved"),
    *("inactive split", "segments", "ooms", "retries"),
    *("synchronisations", "device allocations", "device frees"),
)
"""The numbers of one row: after a step, in an answer of PyTorch's and of the simulator's."""


class _Counted(CachingAllocator):
    """The simulator, with the counts that PyTorch keeps of its calls to the driver."""

    device_allocations = device_frees = synchronisations = 0

    def add_segment(self, address: int, size: int, stream: int, pool: Pool) -> Block:
        self.device_allocations += 1
        return super().add_segment(address, size, stream, pool)

    def release_segment(self, block: Block) -> None:
        self.device_frees += 1
        super().release_segment(block)

    def map_pages(self, block: Block, size: int) -> Block | None:
        mapped = super().map_pages(block, size)
        self.device_allocations += mapped is not None
        return mapped

    def unmap_pages(self, block: Block) -> None:
        reserved = self.reserved_bytes
        super().unmap_pages(block)
        self.device_frees += self.reserved_bytes < reserved

    def empty_cache(self) -> None:
        self.synchronisations += 1
        super().empty_cache()


class Simulated:
    """The simulator, with segments at such addresses as the stand-in's driver gives them."""

    def __init__(self, setup: Setup, fraction: float | None) -> None:
        settings = parse_alloc_conf(setup.conf)
        if fraction is not None:
            settings = replace(settings, per_process_memory_fraction=fraction)
        self.allocator = _Counted(
            setup.capacity, settings, device_total_bytes=setup.total, place_segment=self._place
        )
        self.next_address = 0
        self.live: dict[int, Block | None] = {}

    def _place(self, size: int, _pool: str, _stream: int) -> int:
        address = self.next_address
        self.next_address += -(-size // _GRANULE) * _GRANULE + _GRANULE
        return address

    def step(self, step: Sequence[Any]) -> int | None:
        """Do one step; the address of an allocation, None where it ran out of memory."""
        allocator = self.allocator
        match step:
            case ("alloc", name, size, stream, *pool):
                try:
                    block = allocator.malloc(size, stream, (0, pool[0]) if pool else DEFAULT_POOL)
                except OutOfMemory:
                    return None
                self.live[name] = block
                return 0 if block is None else block.address
            case ("free", name):
                allocator.free(self.live.pop(name))
            case ("record_stream", name, stream):
                recorded = self.live[name]
                if recorded is not None:
                    allocator.record_stream(recorded, stream)
            case ("complete_events", stream):
                allocator.complete_events(stream)
            case ("empty_cache",):
                allocator.empty_cache()
            case ("reset_peaks",):
                allocator.reset_peaks()
            case ("expandable", on):
                allocator.expandable = on
        return 0

    def stats(self) -> list[int]:
        """Return the numbers of ``NAMES`` after the address."""
        a = self.allocator
        split = sum(
            block.size
            for block in a.blocks()
            if block.state == FREE and not block.is_whole_segment and block.range is None
        )
        return [
            *(a.allocated_bytes, a.requested_bytes, a.active_bytes, a.reserved_bytes),
            *(a.allocated_peak_bytes, a.requested_peak_bytes),
            *(a.active_peak_bytes, a.reserved_peak_bytes),
            *(split, len(a.segments), a.num_ooms, a.num_alloc_retries),
            *(a.synchronisations, a.device_allocations, a.device_frees),
        ]

    def layout(self, offset: int) -> list[Any]:
        """Return the segments, or mapped stretches, and their blocks, as an answer has them."""
        found: list[Any] = []
        for head in self.allocator.heads():
            block: Block | None = head
            entry: list[Any] | None = None
            while block is not None:
                if block.state == UNMAPPED:
                    entry = None
                else:
                    if entry is None:
                        entry = [block.address + offset, 0, block.stream, block.pool.name, []]
                        found.append(entry)
                    state = "free" if block.state == FREE else "live"
                    state = "pending" if block.pending_events else state
                    entry[1] += block.size
                    entry[4].append([block.address + offset, block.size, state])
                block = block.next
        return sorted(found)


def replay_difference(snapshot: Path) -> str | None:
    """Replay a recorded snapshot; how it differs from the record, if it does."""
    result = replay(read_trace(snapshot, None))
    return None if result.exact else f"replay of its snapshot: {result}"


def first_difference(setup: Setup, program: dict[str, Any], answer: dict[str, Any]) -> str | None:
    """Run the program in the simulator; the first difference from PyTorch's answer, if any."""
    simulated = Simulated(setup, program["fraction"])
    offset: int | None = None
    for number, (step, row) in enumerate(zip(program["steps"], answer["steps"], strict=True)):
        address = simulated.step(step)
        if step[0] == "alloc" and address is not None and row[0]:
            if offset is None:
                offset = row[0] - address
            address += offset
        mine = [address, *simulated.stats()]
        for name, own, true in zip(NAMES, mine, row, strict=True):
            if own != true:
                return f"step {number} {step}: {name} {own}, of PyTorch {true}"
        layout = answer["layouts"].get(str(number), answer["layouts"].get(number))
        if layout is not None and (own_layout := simulated.layout(offset or 0)) != layout:
            pairs = [(a, b) for a, b in zip(own_layout, layout, strict=False) if a != b]
            return f"step {number} {step}: layout {pairs[:1] or (len(own_layout), len(layout))}"
    return None
