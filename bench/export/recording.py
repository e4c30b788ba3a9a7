"""What a simulated run did, step by step: every block's address, every segment taken and released.

The same decisions as ``simulate`` makes, from the same allocator, written down as they are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import Block, CachingAllocator, OutOfMemory
from bench.predict.allocator.blocks import Pool
from bench.predict.step_trace import Trace

__all__ = ["Action", "Entry", "Recording", "record_run"]

Action = Literal[
    "alloc",
    "free_requested",
    "free_completed",  # at once, unless another stream uses the block
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "oom",
]


class Entry(NamedTuple):
    """One thing that the allocator did. ``identity`` is the allocation's in the trace, else -1.

    ``size``: the bytes asked for, or the segment's; ``block_bytes``: what was handed out for them.
    ``event``: the trace's event that led to it. ``reserved_bytes`` is the sum once it was done.
    """

    action: Action
    address: int
    size: int
    block_bytes: int
    stream: int
    identity: int
    event: int
    reserved_bytes: int


@dataclass(slots=True)
class Recording:
    """A run: its entries, where its phases begin, and the allocator as it was left."""

    allocator: CachingAllocator
    entries: list[Entry] = field(default_factory=list)
    phases: list[tuple[int, str]] = field(default_factory=list)  # (number of entries before, name)
    identities: dict[int, int] = field(default_factory=dict)  # address -> id, of what lives on


class _NotingAllocator(CachingAllocator):
    """Notes what is done, in the order in which PyTorch's history has it."""

    def __init__(self, capacity_bytes: int | None, settings: AllocatorSettings) -> None:
        super().__init__(capacity_bytes, settings)
        self.entries: list[Entry] = []
        self.event = 0
        self.identities: dict[int, int] = {}  # by the address of an allocated block

    def allocate(self, identity: int, size: int, stream: int) -> Block | None:
        try:
            block = self.malloc(size, stream)
        except OutOfMemory:
            self._note("oom", 0, size, 0, stream, identity)
            raise
        if block is not None:
            self.identities[block.address] = identity
            self._note("alloc", block.address, size, block.size, stream, identity)
        return block

    def free(self, block: Block | None) -> None:
        if block is not None:
            self._note_free("free_requested", block)
        super().free(block)

    def _free_now(self, block: Block) -> None:
        self._note_free("free_completed", block)
        del self.identities[block.address]
        super()._free_now(block)

    def add_segment(self, address: int, size: int, stream: int, pool: Pool) -> Block:
        block = super().add_segment(address, size, stream, pool)
        self._note("segment_alloc", address, size, size, stream)
        return block

    def release_segment(self, block: Block) -> None:
        address, size = block.address, block.size
        super().release_segment(block)
        self._note("segment_free", address, size, size, block.stream)

    def map_pages(self, block: Block, size: int) -> Block | None:
        before, address, stream = self.reserved_bytes, block.address, block.stream
        merged = super().map_pages(block, size)
        mapped = self.reserved_bytes - before
        if merged is not None:
            self._note("segment_map", address, mapped, mapped, stream)
        return merged

    def unmap_pages(self, block: Block) -> None:
        assert block.range is not None
        address, size = block.range.whole_pages(block)
        super().unmap_pages(block)
        if size:
            self._note("segment_unmap", address, size, size, block.stream)

    def _note_free(self, action: Action, block: Block) -> None:
        identity = self.identities[block.address]
        self._note(action, block.address, block.requested, block.size, block.stream, identity)

    def _note(
        self, action: Action, address: int, size: int, block: int, stream: int, identity: int = -1
    ) -> None:
        self.entries.append(
            Entry(action, address, size, block, stream, identity, self.event, self.reserved_bytes)
        )


def record_run(
    trace: Trace, capacity_bytes: int | None, settings: AllocatorSettings | None = None
) -> Recording:
    """Run ``trace``, whose workspaces are filled in, and return what the allocator did.

    After a request that does not fit the recording ends, with the entry ``"oom"``.
    """
    allocator = _NotingAllocator(capacity_bytes, settings or AllocatorSettings())
    recording = Recording(allocator, allocator.entries, identities=allocator.identities)
    live: dict[int, Block | None] = {}
    for index, event in enumerate(trace.events):
        allocator.event = index
        match event:
            case ("alloc", identity, size, stream):
                try:
                    live[identity] = allocator.allocate(identity, size, stream)
                except OutOfMemory:
                    break
            case ("free", identity):
                allocator.free(live.pop(identity))
            case ("phase", name):
                recording.phases.append((len(recording.entries), name))
            case ("record_stream", identity, stream):
                if (block := live[identity]) is not None:
                    allocator.record_stream(block, stream)
            case ("complete_events", stream):
                allocator.complete_events(stream)
            case ("empty_cache",):
                allocator.empty_cache()
            case _:
                raise ValueError(f"event {index} is of no known kind: {event!r}")
    return recording
