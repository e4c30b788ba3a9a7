"""A predicted run as a memory snapshot in PyTorch's own form.

What ``torch.cuda.memory._dump_snapshot`` writes of a run on a GPU, of one that had none: the page
https://docs.pytorch.org/memory_viz, ``python -m torch.cuda._memory_viz`` and ``membench replay``
read it. Times are made up, a microsecond for each entry, in order.

The frames of an allocation, innermost first: its operator at the user's source line, the module
that ran, and the phase and category.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from bench.export.recording import Entry, Recording
from bench.predict.alloc_conf import ROUNDUP_INTERVALS, AllocatorSettings
from bench.predict.allocator.blocks import DEFAULT_POOL, LIVE, UNMAPPED, Block
from bench.predict.step_trace import Trace

__all__ = ["Frame", "snapshot"]

Frame = dict[str, Any]  # "filename", "line", "name"


def snapshot(
    recording: Recording, trace: Trace, settings: AllocatorSettings, capacity_bytes: int
) -> dict[str, Any]:
    """Return the snapshot of a run; plain data, ready to be pickled."""
    frames = _frames_of(recording, trace)
    identities = recording.identities
    return {
        "segments": [_segment(blocks, identities, frames) for blocks in _segments(recording)],
        "device_traces": [
            [
                _event(entry, number, frames, trace, capacity_bytes)
                for number, entry in enumerate(recording.entries)
            ]
        ],
        "allocator_settings": _settings(settings),
        "external_annotations": [],
    }


def _frames_of(recording: Recording, trace: Trace) -> Callable[[int], list[Frame]]:
    """Return the frames by an allocation's id, each list made once."""
    phase_of: dict[int, str] = {}
    begins = [*recording.phases, (len(recording.entries), "")]
    for (first, phase), (after, _) in pairwise(begins):
        for entry in recording.entries[first:after]:
            if entry.action in ("alloc", "oom"):
                phase_of[entry.identity] = phase
    made: dict[int, list[Frame]] = {}

    def frames(identity: int) -> list[Frame]:
        if identity not in made:
            site, category = trace.sites[identity], trace.categories[identity]
            filename, _, line = site.source_line.rpartition(":")
            where = {"filename": filename or "??", "line": int(line) if line.isdigit() else 0}
            phase = phase_of.get(identity, "model")
            made[identity] = [
                {**where, "name": site.operator},
                {"filename": "module", "line": 0, "name": site.module or "(no module)"},
                {"filename": "phase", "line": 0, "name": f"{phase}: {category}"},
            ]
        return made[identity]

    return frames


def _event(
    entry: Entry,
    number: int,
    frames: Callable[[int], list[Frame]],
    trace: Trace,
    capacity_bytes: int,
) -> dict[str, Any]:
    event: dict[str, Any] = {
        "action": entry.action,
        "size": entry.size,
        "stream": entry.stream,
        "time_us": number,
        "frames": frames(entry.identity) if entry.identity >= 0 else [],
        "compile_context": "N/A",
        "user_metadata": "",
    }
    if entry.action == "oom":
        event["device_free"] = capacity_bytes - entry.reserved_bytes
    else:
        event["addr"] = entry.address
    if entry.identity >= 0:
        event["user_metadata"] = trace.sites[entry.identity].module
    if entry.action == "alloc":
        event["category"] = trace.categories[entry.identity]
    return event


def _segments(recording: Recording) -> Iterator[list[Block]]:
    """Yield the blocks of each segment, or of each mapped stretch of an expandable one."""
    for head in recording.allocator.heads():
        stretch: list[Block] = []
        block: Block | None = head
        while block is not None:
            if block.state != UNMAPPED:
                stretch.append(block)
            elif stretch:
                yield stretch
                stretch = []
            block = block.next
        if stretch:
            yield stretch


def _segment(
    blocks: list[Block], identities: dict[int, int], frames: Callable[[int], list[Frame]]
) -> dict[str, Any]:
    first = blocks[0]
    entries = [_block(block, identities, frames) for block in blocks]
    active = [entry for entry in entries if entry["state"] != "inactive"]
    return {
        "device": 0,
        "address": first.address,
        "total_size": sum(block.size for block in blocks),
        "allocated_size": sum(e["size"] for e in active if e["state"] == "active_allocated"),
        "active_size": sum(e["size"] for e in active),
        "requested_size": sum(e["requested_size"] for e in active),
        "stream": first.stream,
        "segment_type": first.pool.name,
        "segment_pool_id": DEFAULT_POOL,
        "is_expandable": first.range is not None,
        "frames": [],
        "blocks": entries,
    }


def _block(
    block: Block, identities: dict[int, int], frames: Callable[[int], list[Frame]]
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "address": block.address,
        "size": block.size,
        "requested_size": 0,
        "state": "inactive",
        "frames": [],
    }
    if block.state == LIVE:
        waits = block.pending_events > 0
        entry["state"] = "active_pending_free" if waits else "active_allocated"
        entry["requested_size"] = block.requested
        entry["frames"] = frames(identities[block.address])
    return entry


def _settings(settings: AllocatorSettings) -> dict[str, Any]:
    divisions = settings.roundup_power2_divisions or (0,) * ROUNDUP_INTERVALS
    return {
        "PYTORCH_ALLOC_CONF": settings.to_conf(),
        "max_split_size": settings.max_split_size_bytes or -1,
        "garbage_collection_threshold": settings.garbage_collection_threshold,
        "expandable_segments": settings.expandable_segments,
        "roundup_power2_divisions": {str(1 << i): n for i, n in enumerate(divisions)},
    }
