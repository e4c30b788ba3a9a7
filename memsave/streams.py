"""The one seam between offloading and a device: pinned memory, copies beside computation, waits.

``memsave.offload`` decides what is moved and when; how is decided here. ``CudaStreams`` copies on
a second stream to pinned memory, ``PlainStreams`` at once and on any device. Whoever runs a step
without a device installs another by ``use_streams``: fake tensors have neither streams nor pinned
memory.

A copy is done once somebody has waited for it, and no earlier. Until then its device block must be
held, its target not be read, and its source not be written.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "CudaStreams",
    "HostBuffer",
    "HostBytes",
    "PlainStreams",
    "Streams",
    "Ticket",
    "piece_sizes",
    "streams_for",
    "use_streams",
]

Ticket: TypeAlias = Any  # what a copy is waited for by; its maker alone looks into it

_MOST_PIECES = 8


class HostBytes:
    """How many bytes of host memory are taken, and the most that were at once."""

    def __init__(self) -> None:
        self.now_bytes = 0
        self.peak_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Count bytes taken."""
        self.now_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def give_back(self, size_bytes: int) -> None:
        """Count bytes given back."""
        self.now_bytes -= size_bytes

    def reset_peak(self) -> None:
        """Let the peak begin again at what is taken now."""
        self.peak_bytes = self.now_bytes


class HostBuffer:
    """Host memory for one block of a device, in pieces; counted while it lives."""

    def __init__(self, host: HostBytes, size_bytes: int, pieces: tuple[Tensor, ...] = ()) -> None:
        self.size_bytes = size_bytes
        self.pieces = pieces
        host.take(size_bytes)
        weakref.finalize(self, host.give_back, size_bytes).atexit = False

    def beside(self, block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each piece with its part of ``block``, a flat tensor of bytes, of one length."""
        begin = 0
        for piece in self.pieces:
            part = block[begin : begin + piece.numel()]
            yield piece[: part.numel()], part
            begin += piece.numel()


class Streams(Protocol):
    """What offloading asks of a device. Blocks are flat tensors of bytes (uint8)."""

    host: HostBytes

    def pinned(self, size_bytes: int) -> HostBuffer:
        """Return host memory for a block of ``size_bytes``."""
        ...

    def copy_to_host(self, block: Tensor, buffer: HostBuffer) -> Ticket:
        """Begin to copy ``block``, as the computation queued so far leaves it, to the host."""
        ...

    def copy_to_device(self, buffer: HostBuffer, block: Tensor) -> Ticket:
        """Begin to fill ``block``, once the computation queued so far is done with its memory."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """Let the computation queued from now on begin after that copy, and all before it."""
        ...


class PlainStreams:
    """Copies at once, to pageable memory: for devices without streams of ours, and the CPU."""

    def __init__(self) -> None:
        self.host = HostBytes()

    def pinned(self, size_bytes: int) -> HostBuffer:
        """Return plain host memory."""
        piece = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
        return HostBuffer(self.host, size_bytes, (piece,))

    def copy_to_host(self, block: Tensor, buffer: HostBuffer) -> Ticket:
        """Copy, and return when it is done."""
        for piece, part in buffer.beside(block):
            piece.copy_(part)

    def copy_to_device(self, buffer: HostBuffer, block: Tensor) -> Ticket:
        """Copy, and return when it is done."""
        for piece, part in buffer.beside(block):
            part.copy_(piece)

    def wait(self, ticket: Ticket) -> None:
        """Return: the copy is done."""


class CudaStreams:
    """Copies on a second stream of each GPU, to and from pinned memory.

    One stream for both directions, so a block never comes back before it has left. Blocks are
    allocated and freed on the stream that computes, which waits for the copies: so the caching
    allocator keeps them in that stream's pool, and frees them at once, at the same moment in
    every run. ``record_stream`` would free them whenever an event happens to be seen as done.

    ``cuda`` is ``torch.cuda``, or what stands for it in a test.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.host = HostBytes()
        self._cuda = cuda
        self._beside: dict[torch.device, Any] = {}

    def pinned(self, size_bytes: int) -> HostBuffer:
        """Return pinned host memory, in pieces that PyTorch's pinned allocator takes as they are.

        It rounds up to powers of two: in one piece, 640 MiB would take 1 GiB.
        """
        sizes = piece_sizes(size_bytes)
        pieces = tuple(
            torch.empty(n, dtype=torch.uint8, device="cpu", pin_memory=True) for n in sizes
        )
        return HostBuffer(self.host, sum(sizes), pieces)

    def copy_to_host(self, block: Tensor, buffer: HostBuffer) -> Ticket:
        """Queue the copy on the second stream, behind what computes ``block``."""
        with self._after_computation(block.device) as stream:
            for piece, part in buffer.beside(block):
                piece.copy_(part, non_blocking=True)
            return stream.record_event(), block.device

    def copy_to_device(self, buffer: HostBuffer, block: Tensor) -> Ticket:
        """Queue the copy on the second stream, behind what last used the memory of ``block``."""
        with self._after_computation(block.device) as stream:
            for piece, part in buffer.beside(block):
                part.copy_(piece, non_blocking=True)
            return stream.record_event(), block.device

    def wait(self, ticket: Ticket) -> None:
        """Let the stream that computes wait for the copy; the host does not."""
        event, device = ticket
        self._cuda.current_stream(device).wait_event(event)

    @contextmanager
    def _after_computation(self, device: torch.device) -> Iterator[Any]:
        stream = self._beside.get(device)
        if stream is None:
            stream = self._beside[device] = self._cuda.Stream(device)
        stream.wait_stream(self._cuda.current_stream(device))
        with self._cuda.stream(stream):
            yield stream


def piece_sizes(size_bytes: int) -> list[int]:
    """Return powers of two, largest first, that hold ``size_bytes``: at most 8 of them.

    They add up to ``size_bytes`` where it has no more than 8 binary digits of 1, as with most
    volumes' sides; else the last is rounded up, by less than 1/128 of the whole.
    """
    sizes: list[int] = []
    rest = size_bytes
    while rest:
        size = 1 << (rest.bit_length() - 1)
        if len(sizes) == _MOST_PIECES - 1 and size < rest:
            size *= 2
        sizes.append(size)
        rest -= min(size, rest)
    return sizes


_PLAIN = PlainStreams()
_CUDA = CudaStreams()
_installed: list[Streams] = []


def streams_for(device: torch.device) -> Streams:
    """Return what ``use_streams`` has installed, else what serves devices of this type."""
    if _installed:
        return _installed[-1]
    return _CUDA if device.type == "cuda" else _PLAIN


@contextmanager
def use_streams(streams: Streams) -> Iterator[None]:
    """Let ``streams`` serve every device within this scope."""
    _installed.append(streams)
    try:
        yield
    finally:
        _installed.remove(streams)
