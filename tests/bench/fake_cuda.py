"""A GPU for tests: counters of the caching allocator kept by hand, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.units import MIB

__all__ = ["UUID", "FakeCuda"]

UUID = "GPU-00000000-1111-2222-3333-444444444444"
_COUNTERS = ("requested_bytes", "allocated_bytes", "active_bytes", "reserved_bytes")


class FakeCuda:
    """Answers ``bench.cuda.Cuda``; a scripted workload calls ``allocate`` and ``free``.

    Blocks are rounded up to 512 bytes, segments to 2 MiB and never given back, unless
    ``release_cache`` does it.
    """

    def __init__(self, total_bytes: int = 1024 * MIB, context_bytes: int = 100 * MIB) -> None:
        self.device = torch.device("cpu")
        self.uuid = UUID
        self.name = "NVIDIA Test"
        self.total_bytes = total_bytes
        self.compute_capability = "9.0"
        self.context_bytes = context_bytes
        self.others_bytes = 0  # other processes, and the driver's reserve
        self.limit_bytes = total_bytes - context_bytes
        self.current = dict.fromkeys(_COUNTERS, 0)
        self.peak = dict.fromkeys(_COUNTERS, 0)
        self.ooms = 0
        self.synchronized = True
        self.clock_s = 0.0
        self.reads_while_busy = 0
        self.timed = 0

    def allocate(self, size: int) -> None:
        """Allocate, or raise as torch does when it does not fit."""
        self.synchronized = False
        block = -(-size // 512) * 512
        active = self.current["active_bytes"] + block
        reserved = max(self.current["reserved_bytes"], -(-active // (2 * MIB)) * 2 * MIB)
        if reserved > self.limit_bytes:
            self.ooms += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / MIB:.2f} MiB. GPU 0 has a total"
            )
        self._add(requested_bytes=size, allocated_bytes=block, active_bytes=block)
        self.current["reserved_bytes"] = reserved
        self.peak = {k: max(self.peak[k], self.current[k]) for k in _COUNTERS}

    def free(self, size: int) -> None:
        """Free what ``allocate(size)`` took."""
        block = -(-size // 512) * 512
        self._add(requested_bytes=-size, allocated_bytes=-block, active_bytes=-block)

    def release_cache(self) -> None:
        """Give back the segments that hold nothing, as the allocator does under pressure."""
        active = self.current["active_bytes"]
        self.current["reserved_bytes"] = -(-active // (2 * MIB)) * 2 * MIB

    def _add(self, **changes: int) -> None:
        for name, change in changes.items():
            self.current[name] += change

    @property
    def process_bytes(self) -> int:
        """What a driver that sees this process would say of it."""
        return self.context_bytes + self.current["reserved_bytes"]

    def visible(self) -> list[dict[str, Any]]:
        return [{"name": self.name, "uuid": self.uuid, "memory_bytes": self.total_bytes}]

    def memory_stats(self) -> dict[str, int]:
        self.reads_while_busy += not self.synchronized
        peaks = {f"{name}.all.peak": value for name, value in self.peak.items()}
        now = {f"{name}.all.current": value for name, value in self.current.items()}
        return {**peaks, **now, "num_ooms": self.ooms}

    def reset_peak_memory_stats(self) -> None:
        self.peak = dict(self.current)

    def synchronize(self) -> None:
        self.synchronized = True

    def mem_get_info(self) -> tuple[int, int]:
        used = self.others_bytes + self.process_bytes
        return self.total_bytes - used, self.total_bytes

    def set_memory_fraction(self, fraction: float) -> None:
        self.limit_bytes = int(fraction * self.total_bytes)

    def time_s(self, run: Callable[[], None]) -> float:
        before = self.clock_s
        run()
        self.timed += 1
        return self.clock_s - before
