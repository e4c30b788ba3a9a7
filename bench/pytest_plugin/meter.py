"""A test's peaks on a real GPU, from torch's counters; and what every meter can be asked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench import nvml
from bench.cuda import Cuda
from bench.pytest_plugin.usage import Reading
from bench.record import Evidence, Tracer

__all__ = ["MeasuredMeter", "Meter", "Window"]

_COUNTERS = {
    "peak_requested_bytes": "requested_bytes.all.peak",
    "peak_allocated_bytes": "allocated_bytes.all.peak",
    "peak_active_bytes": "active_bytes.all.peak",
    "peak_reserved_bytes": "reserved_bytes.all.peak",
}


@dataclass(slots=True)
class Window:
    """A time over which peaks are kept; windows may lie in one another."""

    reading: Reading


class Meter(Protocol):
    """Reads peaks, of a GPU or of a simulated one."""

    @property
    def evidence(self) -> Evidence:
        """Whether it measures or predicts."""

    @property
    def tracer(self) -> Tracer | None:
        """How a prediction was traced; None for a measurement."""

    @property
    def card(self) -> str:
        """The card that the figures are of."""

    def window(self) -> AbstractContextManager[Window]:
        """Keep peaks from here on until the ``with`` ends."""

    def read(self, window: Window) -> Reading:
        """Return the peaks of a window so far."""


class MeasuredMeter:
    """The peaks of torch's caching allocator on ``cuda:0``.

    torch keeps one set of peaks, so each window that begins or ends reads them into those around
    it, and so does a test that resets them itself. ``cuda`` is a GPU, or a stand-in for one.
    """

    evidence: Evidence = "measured"
    tracer: Tracer | None = None

    def __init__(self, cuda: Cuda, card: str) -> None:
        self._cuda = cuda
        self._open: list[Window] = []
        self.card = card

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Keep peaks from here on until the ``with`` ends."""
        self._fold()
        self._cuda.reset_peak_memory_stats()
        window = Window(Reading(before_allocated_bytes=self._now("allocated")))
        self._open.append(window)
        try:
            with self._reset_by_test():
                yield window
        finally:
            self._fold()
            self._open.remove(window)

    def read(self, window: Window) -> Reading:
        """Return the peaks of a window so far, and the process's memory as NVML has it now."""
        self._fold()
        reserved = self._now("reserved")
        sample = nvml.best_process_bytes(
            self._cuda.uuid, os.getpid(), reserved_bytes=reserved, used_before_bytes=None, notes=[]
        )
        # The allocator gives nothing back unless it must; where it had to, what is outside of it
        # stands on top of the peak.
        outside = None if sample is None else max(0, sample - reserved)
        process = None if outside is None else window.reading.peak_reserved_bytes + outside
        return dataclasses.replace(window.reading, process_bytes=process)

    def _now(self, counter: str) -> int:
        name = f"{counter}_bytes.all.current"
        return self._cuda.memory_stats().get(name, 0)

    def _fold(self) -> None:
        """Raise the peaks of every window to torch's since they were last reset."""
        if not self._open:
            return
        self._cuda.synchronize()
        stats = self._cuda.memory_stats()
        for window in self._open:
            highest = {
                name: max(getattr(window.reading, name), stats.get(key, 0))
                for name, key in _COUNTERS.items()
            }
            window.reading = dataclasses.replace(window.reading, **highest)

    @contextmanager
    def _reset_by_test(self) -> Iterator[None]:
        """Read the peaks before the test's own code resets them."""
        if len(self._open) > 1:  # the outermost window sees to it
            yield
            return
        reset = torch.cuda.reset_peak_memory_stats

        def fold_and_reset(device: Any = None) -> None:
            self._fold()
            reset(device)

        torch.cuda.reset_peak_memory_stats = fold_and_reset
        try:
            yield
        finally:
            torch.cuda.reset_peak_memory_stats = reset
