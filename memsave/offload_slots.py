"""A block of device memory that has moved to the host, and the tensors that come back from it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from memsave.streams import Streams, Ticket

__all__ = ["Geometry", "Left", "Saved", "Shared", "Slot", "flat"]

Geometry = tuple[torch.Size, tuple[int, ...], int]  # sides, strides, offset in the storage


def flat(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    """Return a whole storage as a tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class Left:
    """A saved tensor left where it is. A change in place is an error, as it is without hooks."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()  # or a saved result would own the node that owns it
        self._version = tensor._version

    def value(self) -> Tensor:
        """Return the tensor; RuntimeError if it has been changed in place since."""
        if self._tensor._version != self._version:
            raise modified(tuple(self._tensor.shape), self._tensor.dtype)
        return self._tensor


class Shared:
    """A storage and its version count, without holding the storage's memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        # Of the same version count as the tensor, and of no memory.
        self._counter = tensor.detach()
        self._counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._version = tensor._version

    def unchanged(self) -> bool:
        """Whether nobody has written into it since."""
        return bool(self._counter._version == self._version)

    def storage(self) -> torch.UntypedStorage | None:
        """Return the storage if it is alive and unchanged."""
        return self._storage() if self.unchanged() else None

    def tensor(self, dtype: torch.dtype, geometry: Geometry) -> Tensor | None:
        """Return a tensor of the storage, of the same version count; None if it is gone."""
        storage = self.storage()
        if storage is None:
            return None
        size, stride, offset = geometry
        tensor = self._counter.detach()
        empty = torch.empty(0, dtype=dtype, device=tensor.device)
        tensor.data = empty.set_(storage, offset, size, stride)
        return tensor


class Slot:
    """One storage of the device at one version, moved to the host once for all that saved it.

    ``held`` keeps its device memory: from the start of a copy to the wait for it, and while it is
    held ready for backward.
    """

    def __init__(self, tensor: Tensor, streams: Streams) -> None:
        storage = tensor.untyped_storage()
        self.size_bytes = storage.nbytes()
        self.device = tensor.device
        self.held: Tensor | None = flat(storage, tensor.device)
        self._streams = streams
        self._shared = Shared(tensor)
        self._is_original = True
        self._modified = False
        self._buffer = streams.pinned(self.size_bytes)
        self._ticket: Ticket = streams.copy_to_host(self.held, self._buffer)
        self.in_flight = True

    def is_current(self) -> bool:
        """Whether the storage that was moved is alive and still has what the slot holds."""
        return self._is_original and self._shared.storage() is not None

    def settle(self) -> None:
        """Wait for the copy under way, if there is one."""
        if self.in_flight:
            self._streams.wait(self._ticket)
            self._ticket = None
            self.in_flight = False
            # What wrote into a block before its copy was done may or may not be in the copy.
            self._modified |= self._is_original and not self._shared.unchanged()

    def release(self) -> None:
        """Let go of the device memory, once the copy under way is done."""
        self.settle()
        self.held = None

    def bring(self) -> None:
        """Hold the device memory; begin to copy it back unless it is still there."""
        if self.held is not None and self._shared.unchanged():
            return
        storage = self._shared.storage()
        if storage is not None:
            self.held = flat(storage, self.device)
            return
        self.release()
        self.held = torch.empty(self.size_bytes, dtype=torch.uint8, device=self.device)
        self._shared, self._is_original = Shared(self.held), False
        block = flat(self.held.untyped_storage(), self.device)  # to be filled does not count
        self._ticket = self._streams.copy_to_device(self._buffer, block)
        self.in_flight = True

    def tensor(self, dtype: torch.dtype, geometry: Geometry) -> Tensor:
        """Return a tensor of the block as it was saved; the caller alone then holds it."""
        self.settle()
        if self._modified:
            raise modified(tuple(geometry[0]), dtype)
        tensor = self._shared.tensor(dtype, geometry)
        if tensor is None:
            self.bring()
            self.settle()
            tensor = self._shared.tensor(dtype, geometry)
            assert tensor is not None  # it is held
        return tensor

    def __del__(self) -> None:
        # A copy must not write into memory, nor read any, that somebody else has got by then.
        if getattr(self, "in_flight", False):
            self._streams.wait(self._ticket)


class Saved:
    """What autograd holds in place of a tensor: where in which slot it lies."""

    def __init__(self, slot: Slot, tensor: Tensor, place: int) -> None:
        self.slot = slot
        self.place = place  # in the order of saving
        self.asked_in = -1  # the backward pass that has had it
        self._dtype = tensor.dtype
        self._geometry = (tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def value(self) -> Tensor:
        """Return the tensor, on its device."""
        return self.slot.tensor(self._dtype, self._geometry)


def modified(shape: tuple[int, ...], dtype: torch.dtype) -> RuntimeError:
    """Return the error of a tensor that somebody wrote into after it was saved."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: a {dtype} tensor of shape {shape}, saved for backward and offloaded; let "
        "nothing write into what a layer still needs"
    )
