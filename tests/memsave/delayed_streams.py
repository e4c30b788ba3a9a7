"""Streams on the CPU that copy as late as a GPU may: a copy is done when it is waited for."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memsave.offload_slots import flat
from memsave.streams import HostBuffer, HostBytes, Ticket

__all__ = ["DelayedStreams", "NeverWaiting"]


class DelayedStreams:
    """One queue of copies, run by ``wait`` in order. What is not there yet is poison: NaN.

    A block that is freed before its copy was waited for raises: on a GPU somebody else would have
    its memory. ``peak_pending_bytes``: the most that was copied and not yet waited for. Host memory
    is numpy's, so that whoever counts tensors counts the device alone.
    """

    def __init__(self) -> None:
        self.host = HostBytes()
        self.log: list[tuple[str, int]] = []  # direction and bytes
        self.peak_pending_bytes = 0
        self._contents: weakref.WeakKeyDictionary[HostBuffer, npt.NDArray[np.uint8]] = (
            weakref.WeakKeyDictionary()
        )
        self._jobs: list[tuple[int, Callable[[], object]]] = []
        self._done = 0

    def pinned(self, size_bytes: int) -> HostBuffer:
        buffer = HostBuffer(self.host, size_bytes)
        self._contents[buffer] = np.full(size_bytes, 255, np.uint8)
        return buffer

    def copy_to_host(self, block: Tensor, buffer: HostBuffer) -> Ticket:
        contents, source = self._contents[buffer], _weak(block)
        return self._queue("out", block, lambda: contents.__setitem__(..., source().numpy()))

    def copy_to_device(self, buffer: HostBuffer, block: Tensor) -> Ticket:
        contents, target = self._contents[buffer], _weak(block)
        block.fill_(255)
        return self._queue("in", block, lambda: target().copy_(torch.from_numpy(contents)))

    def wait(self, ticket: Ticket) -> None:
        while self._done < ticket:
            self._jobs[self._done][1]()
            self._done += 1

    @property
    def pending(self) -> int:
        """How many copies nobody has waited for."""
        return len(self._jobs) - self._done

    def _queue(self, direction: str, block: Tensor, job: Callable[[], object]) -> int:
        self.log.append((direction, block.nbytes))
        self._jobs.append((block.nbytes, job))
        pending = sum(size for size, _ in self._jobs[self._done :])
        self.peak_pending_bytes = max(self.peak_pending_bytes, pending)
        return len(self._jobs)


class NeverWaiting(DelayedStreams):
    """A broken seam: nobody waits, so nothing that was moved ever arrives."""

    def wait(self, ticket: Ticket) -> None:
        """Forget to."""


def _weak(block: Tensor) -> Callable[[], Tensor]:
    storage = weakref.ref(block.untyped_storage())

    def alive() -> Tensor:
        held = storage()
        assert held is not None, "a block was freed before its copy was waited for"
        return flat(held, torch.device("cpu"))

    return alive
