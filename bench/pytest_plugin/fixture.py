"""The ``gpu_memory`` fixture: a test's own look at its peaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.errors import MembenchError
from bench.pytest_plugin.meter import Meter, Window
from bench.pytest_plugin.usage import Limit, Reading
from bench.record import Evidence

__all__ = ["GpuMemory", "Tracked"]


@dataclass(slots=True)
class Tracked:
    """The peaks of a ``with gpu_memory.track()``, in bytes; those so far while it runs."""

    _meter: Meter
    _window: Window
    _last: Reading | None = None

    @property
    def before_allocated_bytes(self) -> int:
        """Allocated as the block began."""
        return self._reading.before_allocated_bytes

    @property
    def peak_allocated_bytes(self) -> int:
        """The highest that tensors and library workspaces took, with what lived before."""
        return self._reading.peak_allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The highest that the caching allocator held."""
        return self._reading.peak_reserved_bytes

    @property
    def growth_bytes(self) -> int:
        """How far the allocated peak rose above what lived before."""
        return self.peak_allocated_bytes - self.before_allocated_bytes

    @property
    def _reading(self) -> Reading:
        return self._last or self._meter.read(self._window)


class GpuMemory:
    """Peak GPU memory of the running test, measured on a GPU or predicted for a card.

    Bytes are whole numbers. ``evidence`` is ``"measured"`` or ``"predicted"``; a predicted test
    runs on fake tensors, which have shapes and no values, so assert on values only
    ``if gpu_memory.evidence == "measured"``.
    """

    def __init__(self, meter: Meter, limit: Limit) -> None:
        self._meter = meter
        self._limit = limit
        self._test: Window | None = None

    @property
    def evidence(self) -> Evidence:
        """``"measured"`` or ``"predicted"``."""
        return self._meter.evidence

    @property
    def card(self) -> str:
        """The card that the figures are of, as ``v100-32gb``."""
        return self._meter.card

    @property
    def limit_bytes(self) -> int | None:
        """What ``limit_gpu_memory`` allows this test; None without one."""
        return self._limit.size_bytes

    @property
    def peak_allocated_bytes(self) -> int:
        """The highest allocated since the test began, with what its fixtures keep."""
        return self._so_far().peak_allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The highest that the caching allocator held since the test began."""
        return self._so_far().peak_reserved_bytes

    @contextmanager
    def track(self) -> Iterator[Tracked]:
        """Keep the peaks of a part of the test; may lie in one another."""
        with self._meter.window() as window:
            tracked = Tracked(self._meter, window)
            try:
                yield tracked
            finally:
                tracked._last = self._meter.read(window)

    def begin(self, window: Window) -> None:
        """Know that the test's own code begins."""
        self._test = window

    def _so_far(self) -> Reading:
        if self._test is None:
            raise MembenchError(
                "gpu_memory has no peak before the test begins: in a fixture use gpu_memory.track()"
            )
        return self._meter.read(self._test)
