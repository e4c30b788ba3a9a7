"""The caching allocator of a card, fed with a trace while it is still being made.

What the simulator of whole runs gives for a case, this gives for any span of a test: the peaks,
who held the bytes, and what did not fit. It also answers what torch's own counters would say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import Block, CachingAllocator, OutOfMemory
from bench.predict.cards import Card
from bench.predict.predictor import peak_holders
from bench.predict.step_trace import Trace, releases_in_order
from bench.predict.workspaces import fill_workspaces
from bench.pytest_plugin.meter import Window
from bench.pytest_plugin.usage import Reading
from bench.record import Evidence, Tracer
from bench.units import format_bytes

__all__ = ["PredictedMeter"]


@dataclasses.dataclass(slots=True)
class _Span(Window):
    """A window, and the event at which its allocated peak stood first; -1 before any."""

    peak_at_event: int = -1


class PredictedMeter:
    """The peaks that the events of ``trace`` so far would have given on ``card``.

    Windows are exact, however they lie in one another. After an out-of-memory nothing more is
    counted: on the card the test would have ended there.
    """

    evidence: Evidence = "predicted"

    def __init__(
        self, trace: Trace, tracer: Tracer, card: Card, settings: AllocatorSettings
    ) -> None:
        self.tracer: Tracer = tracer
        self.card = card.name
        self.out_of_memory = ""
        self._card = card
        self._source = trace
        self._allocator = CachingAllocator(card.capacity_bytes, settings)
        self._live: dict[int, Block | None] = {}
        self._events: list[Any] = []  # those that were played
        self._open: list[_Span] = []

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Keep peaks from here on until the ``with`` ends."""
        self._play()
        allocated = self._allocator.allocated_bytes
        span = _Span(
            Reading(
                before_allocated_bytes=allocated,
                peak_requested_bytes=self._allocator.requested_bytes,
                peak_allocated_bytes=allocated,
                peak_active_bytes=self._allocator.active_bytes,
                peak_reserved_bytes=self._allocator.reserved_bytes,
            ),
            peak_at_event=len(self._events) - 1,
        )
        self._open.append(span)
        try:
            yield span
        finally:
            self._play()
            self._open.remove(span)

    def read(self, window: Window) -> Reading:
        """Return the peaks of a window so far, and who held the bytes at the allocated one."""
        self._play()
        assert isinstance(window, _Span)
        reading = window.reading
        return dataclasses.replace(
            reading,
            process_bytes=reading.peak_reserved_bytes + self._card.context_bytes,
            holders=self._holders(window.peak_at_event),
            out_of_memory=self.out_of_memory,
        )

    def empty_cache(self) -> None:
        """Give back what is cached, as ``torch.cuda.empty_cache`` does."""
        self._play()
        self._allocator.empty_cache()

    def reset_peaks(self) -> None:
        """Do what ``torch.cuda.reset_peak_memory_stats`` does; windows keep their peaks."""
        self._play()
        self._allocator.reset_peaks()

    def memory_stats(self) -> dict[str, int]:
        """Return torch's flat counters of bytes, as they would stand now."""
        self._play()
        stats: dict[str, int] = {}
        for name in ("requested", "allocated", "active", "reserved"):
            for key, field in (("current", "bytes"), ("peak", "peak_bytes")):
                counter = getattr(self._allocator, f"{name}_{field}")
                stats[f"{name}_bytes.all.{key}"] = counter
        return stats

    # -- playing ----------------------------------------------------------------------------

    def _play(self) -> None:
        """Bring the allocator to where the test is."""
        done = len(self._events)
        if self.out_of_memory or done == len(self._source.events):
            return
        for event in releases_in_order(self._source.events[done:]):
            self._events.append(event)
            try:
                self._play_one(event)
            except OutOfMemory as error:
                allocated = format_bytes(error.counters.allocated_bytes)
                self.out_of_memory = (
                    f"out of memory on {self.card}: tried to allocate "
                    f"{format_bytes(error.request_bytes)} with {allocated} allocated of "
                    f"{format_bytes(self._card.capacity_bytes)}"
                )
                return

    def _play_one(self, event: Any) -> None:
        match event:
            case ("alloc", identity, size, stream):
                self._live[identity] = self._malloc(size, stream)
            case ("free", identity):
                self._allocator.free(self._live.pop(identity))
            case ("convolution", operand_bytes, kind, _):
                size = self._card.convolution_workspace_bytes(kind, operand_bytes)
                self._allocator.free(self._malloc(size, 0))
            case ("cublas", stream, _):
                self._malloc(self._card.cublas_workspace_bytes, stream)

    def _malloc(self, size: int, stream: int) -> Block | None:
        allocator = self._allocator
        block = allocator.malloc(size, stream)
        for span in self._open:
            reading = span.reading
            if allocator.allocated_bytes > reading.peak_allocated_bytes:
                span.peak_at_event = len(self._events) - 1
            span.reading = dataclasses.replace(
                reading,
                peak_requested_bytes=max(reading.peak_requested_bytes, allocator.requested_bytes),
                peak_allocated_bytes=max(reading.peak_allocated_bytes, allocator.allocated_bytes),
                peak_active_bytes=max(reading.peak_active_bytes, allocator.active_bytes),
                peak_reserved_bytes=max(reading.peak_reserved_bytes, allocator.reserved_bytes),
            )
        return block

    def _holders(self, at_event: int) -> tuple[Any, ...]:
        """Return who is alive once event ``at_event`` has run; a convolution's workspace too."""
        if at_event < 0:
            return ()
        source = self._source
        until = Trace(
            events=self._events[: at_event + 1], sites=source.sites, categories=source.categories
        )
        filled = fill_workspaces(until, self._card)
        within = 2 if self._events[at_event][0] == "convolution" else 1
        return tuple(peak_holders(filled, len(filled.events) - within))
