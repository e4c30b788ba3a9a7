"""What offloading asks of a device, under the tracer: bytes are counted and nothing is copied.

A block in flight is held by whoever asked for the copy until the next wait on it, and the trace
frees it when its storage dies: so it is active that long in the simulator too. Blocks are
allocated and freed on the stream that computes, as ``memsave.streams.CudaStreams`` has it.
"""

from __future__ import annotations

from torch import Tensor

from bench.predict.tracer import Tracer
from memsave.streams import HostBuffer, HostBytes, Ticket, piece_sizes

__all__ = ["TracedStreams", "peak_host_bytes"]


class TracedStreams:
    """Streams without a device: host bytes taken and given back become events of the trace."""

    def __init__(self, tracer: Tracer) -> None:
        self.host: HostBytes = _TracedHost(tracer)
        self._tracer = tracer

    def pinned(self, size_bytes: int) -> HostBuffer:
        """Return a buffer of no memory, of as many bytes as pinned memory would take."""
        return HostBuffer(self.host, sum(piece_sizes(size_bytes)))

    def copy_to_host(self, block: Tensor, buffer: HostBuffer) -> Ticket:
        """Copy nothing: a fake tensor has no values."""

    def copy_to_device(self, buffer: HostBuffer, block: Tensor) -> Ticket:  # noqa: ARG002
        """Know the block for what it is, an activation."""
        self._tracer.categorise(iter((block,)), "activation")

    def wait(self, ticket: Ticket) -> None:
        """Let the holder go on."""


class _TracedHost(HostBytes):
    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def take(self, size_bytes: int) -> None:
        super().take(size_bytes)
        self._tracer.host(size_bytes)

    def give_back(self, size_bytes: int) -> None:
        super().give_back(size_bytes)
        self._tracer.host(-size_bytes)


def peak_host_bytes(events: list[tuple[object, ...]]) -> int | None:
    """Return the most host bytes that were taken at once; None where none ever were."""
    now = peak = 0
    for event in events:
        if event[0] == "host":
            change = event[1]
            assert isinstance(change, int)
            now += change
            peak = max(peak, now)
    return peak or None
