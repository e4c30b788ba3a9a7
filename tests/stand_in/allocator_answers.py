"""What PyTorch's own CUDA caching allocator answers to programs of allocations and frees.

Run in a process with a CUDA device, real or a stand-in whose memory is counted:
``python -m tests.stand_in.allocator_answers programs.json answers.json``. The settings are those
of the process: ``PYTORCH_CUDA_ALLOC_CONF`` and the device's memory. Program number N leaves its
snapshot as N.pickle beside the answers.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["answer", "answer_all"]

Step = Sequence[Any]
_BYTES = ("allocated_bytes", "requested_bytes", "active_bytes", "reserved_bytes")
_COUNTS = ("num_ooms", "num_alloc_retries", "num_sync_all_streams")
_DEVICE_COUNTS = ("num_device_alloc", "num_device_free")
_STATES = {"active_allocated": "live", "active_pending_free": "pending", "inactive": "free"}


class _Events:
    """The stand-in's events, which can be held back; a real device has no such switch."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self.held = hasattr(library, "standin_hold_events")
        self._library = library

    def hold(self) -> None:
        if self.held:
            self._library.standin_hold_events(1)

    def finish(self, stream: torch.cuda.Stream) -> None:
        if self.held:
            self._library.standin_finish_stream(ctypes.c_void_p(stream.cuda_stream))


class _Run:
    def __init__(self, streams: Sequence[torch.cuda.Stream], events: _Events) -> None:
        self.streams = streams
        self.events = events
        self.live: dict[int, torch.Tensor] = {}
        self.pools: dict[int, Any] = {}
        self.switched = False

    def step(self, step: Step) -> int | None:
        """Do one step; the address of an allocation, None where it ran out of memory."""
        match step:
            case ("alloc", name, size, stream, *pool):
                return self._allocate(name, size, stream, *pool)
            case ("free", name):
                self.live.pop(name, None)  # None where PyTorch alone ran out of memory
            case ("record_stream", name, stream):
                if name in self.live:
                    self.live[name].record_stream(self.streams[stream])
            case ("complete_events", stream):
                self.events.finish(self.streams[stream])
            case ("empty_cache",):
                torch.cuda.empty_cache()
            case ("reset_peaks",):
                torch.cuda.reset_peak_memory_stats()
            case ("expandable", on):
                self.switched = True
                torch.cuda.memory._set_allocator_settings(f"expandable_segments:{on}")
            case _:
                raise ValueError(f"no such step: {step!r}")
        return 0

    def _allocate(self, name: int, size: int, stream: int, pool: int = 0) -> int | None:
        try:
            with torch.cuda.stream(self.streams[stream]):
                if pool:
                    if pool not in self.pools:
                        self.pools[pool] = torch.cuda.MemPool()
                    with torch.cuda.use_mem_pool(self.pools[pool]):
                        tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
                else:
                    tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            return None
        self.live[name] = tensor
        return tensor.data_ptr()

    def clean_up(self) -> None:
        """Leave an allocator without a byte and without a range of addresses.

        A range of which no page could be mapped stays until it is used: so each is used once.
        """
        self.live.clear()
        self.pools.clear()
        for stream in self.streams:
            self.events.finish(stream)
        torch.cuda.empty_cache()
        if self.switched:
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        for stream in self.streams:
            with torch.cuda.stream(stream):
                for size in (1, 2 * 2**20):
                    torch.empty(size, dtype=torch.uint8, device="cuda")
        torch.cuda.empty_cache()
        if self.switched:
            torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def _stats(before: dict[str, int]) -> list[int]:
    stats = torch._C._cuda_memoryStats(0)
    row = [stats[name]["all"]["current"] for name in _BYTES]
    row += [stats[name]["all"]["peak"] for name in _BYTES]
    row += [stats["inactive_split_bytes"]["all"]["current"], stats["segment"]["all"]["current"]]
    return row + [stats[name] - before[name] for name in _COUNTS + _DEVICE_COUNTS]


def _layout(streams: Sequence[torch.cuda.Stream]) -> list[Any]:
    handles = {stream.cuda_stream: number for number, stream in enumerate(streams)}
    return [
        [
            segment["address"],
            segment["total_size"],
            handles[segment["stream"]],
            segment["segment_type"],
            [[b["address"], b["size"], _STATES[b["state"]]] for b in segment["blocks"]],
        ]
        for segment in sorted(
            torch.cuda.memory._snapshot()["segments"], key=lambda one: int(one["address"])
        )
    ]


def answer(
    program: dict[str, Any], streams: Sequence[torch.cuda.Stream], events: _Events, snapshot: Path
) -> dict[str, Any]:
    """Run one program from an empty allocator; the memory is given back at its end.

    ``steps`` of the answer are rows: address, the bytes of now, their peaks, inactive split bytes,
    segments, counts. ``layouts`` are the segments and blocks after every tenth step and the last.
    """
    if program["fraction"] is not None:
        torch.cuda.set_per_process_memory_fraction(program["fraction"])
    torch.cuda.reset_peak_memory_stats()
    stats = torch._C._cuda_memoryStats(0)
    before = {name: stats[name] for name in _COUNTS + _DEVICE_COUNTS}
    if any(stats[name]["all"]["current"] for name in _BYTES):
        raise RuntimeError("the allocator is not empty as the program begins")
    run, history = _Run(streams, events), program["history"]
    rows, layouts = [], {}
    for number, step in enumerate(program["steps"]):
        if number == history["from"]:
            torch.cuda.memory._record_memory_history(
                context=history["context"], stacks="python", max_entries=history["entries"]
            )
        rows.append([run.step(step), *_stats(before)])
        if number % 10 == 9 or number == len(program["steps"]) - 1:
            layouts[number] = _layout(streams)
    torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]
    torch.cuda.memory._record_memory_history(enabled=None)
    run.clean_up()
    return {"steps": rows, "layouts": layouts}


def answer_all(programs: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run the programs one after the other; their snapshots go to ``folder``."""
    events = _Events()
    torch.cuda.init()  # type: ignore[no-untyped-call]
    streams = [torch.cuda.default_stream()]
    streams += [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    events.hold()
    return [
        answer(program, streams, events, folder / f"{number}.pickle")
        for number, program in enumerate(programs)
    ]


def main(asked: Path, answered: Path) -> None:
    """Answer the programs of one file in another."""
    answers = answer_all(json.loads(asked.read_text()), answered.parent)
    answered.write_text(json.dumps({"torch": torch.__version__, "answers": answers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
