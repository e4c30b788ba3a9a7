"""Saved activations in host memory: out on a second stream in forward, back ahead of backward.

Source: Rhu et al., "vDNN", MICRO 2016, arXiv:1602.08124. Autograd hands over what it saves by
``torch.autograd.graph.saved_tensors_hooks``; streams and pinned memory are ``memsave.streams``'.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memsave.errors import OptionError
from memsave.offload_slots import Left, Saved, Slot
from memsave.recompute_scope import active_hooks
from memsave.saved_parameters import ParameterStorages, storage_key
from memsave.streams import Streams, streams_for

__all__ = ["OffloadOptions", "offload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptions:
    """What is moved to the host, and how much device memory the moving may take."""

    minimum_bytes: int = 2**20  # smaller blocks stay on the device
    in_flight_bytes: int = 2**30  # of blocks on their way, or brought ahead of their use

    def __post_init__(self) -> None:
        for name, value in (
            ("minimum_bytes", self.minimum_bytes),
            ("in_flight_bytes", self.in_flight_bytes),
        ):
            if value < 0:
                raise OptionError(f"{name} must be 0 or more bytes, got {value}")


@contextmanager
def offload(
    model: nn.Module, *, minimum_bytes: int = 2**20, in_flight_bytes: int = 2**30
) -> Iterator[None]:
    """Keep in host memory what ``model`` saves for backward, from a size on::

        with memsave.offload(model):
            loss = criterion(model(image), labels)
        loss.backward()  # inside the scope or after it

    A block of device memory moves once, however many saved tensors and views share it. Copies run
    beside the computation: a block leaves on a second stream while the network goes on, and comes
    back while backward works on the layers after it. Parameters and buffers stay, and so do views
    of them and the copies of them that autocast makes (not those of a frozen parameter, nor those
    that ``recompute`` hands on, which nothing in the graph tells from activations).

    Memory: of blocks of ``minimum_bytes`` or more, the device keeps none for backward, and the
        host each one's bytes (pinned; a block with more than 8 binary digits of 1 in its size up
        to 1/128 more). On top the device holds what is in flight: in forward up to
        ``in_flight_bytes`` of blocks whose copies have not been waited for, or one larger block;
        in backward up to ``in_flight_bytes`` brought ahead of their use, beside those that the
        running operation reads. 0: every copy is waited for at once, which saves most and takes
        longest. What the caller keeps alive, such as the input, is not freed by being copied.
    Exact: bit for bit; blocks are copied, not converted.
    Time: bytes moved over the host's link, hidden behind the computation as far as it lasts.
    Errors: OptionError for negative sizes, and inside another scope of saved tensors, whose
        tensors it would take away: enter it first, around ``recompute`` and checkpoints, which
        then offload what they keep. RuntimeError in backward if a saved tensor is changed in
        place before its copy has been waited for; later changes do no harm.

    Several backward passes (``retain_graph=True``) bring the blocks back each time. One device a
    scope, that of the first parameter: tensors elsewhere are left alone. On the CPU it works, to
    no purpose: host and device memory are one.
    """
    OffloadOptions(minimum_bytes=minimum_bytes, in_flight_bytes=in_flight_bytes)
    if active_hooks() is not None:
        raise OptionError(
            "offload inside another scope of saved tensors would take its tensors away: enter "
            "offload first, around recompute, compress_activations, checkpoints and other hooks"
        )
    scope = _Scope(model, minimum_bytes, in_flight_bytes)
    with saved_tensors_hooks(scope.pack, scope.unpack):
        yield


class _Scope:
    """What one scope knows: ``pack`` and ``unpack`` are its hooks, the order is autograd's."""

    def __init__(self, model: nn.Module, minimum_bytes: int, in_flight_bytes: int) -> None:
        first = next(model.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._streams: Streams = streams_for(self._device)
        self._minimum_bytes, self._in_flight_bytes = minimum_bytes, in_flight_bytes
        self._parameters = ParameterStorages(model)
        self._slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
        self._order: list[weakref.ref[Saved]] = []  # as packed; backward comes the other way
        self._leaving: list[weakref.ref[Slot]] = []  # oldest first
        self._ready: list[Slot] = []  # held for backward, the next one first
        self._ends_at = -1  # the backward at whose end nothing is held any more
        self._lock = threading.RLock()  # autograd runs each device's backward in its own thread

    def pack(self, tensor: Tensor) -> Saved | Left:
        """Return what to keep of a tensor that an operation saves."""
        with self._lock, torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            if not self._moves(tensor):
                return Left(tensor)
            key = storage_key(tensor)
            slot = self._slots.get(key)
            if slot is None or not slot.is_current():
                slot = self._slots[key] = self._send(tensor)
            saved = Saved(slot, tensor, place=len(self._order))
            self._order.append(weakref.ref(saved))
            return saved

    def unpack(self, saved: Saved | Left) -> Tensor:
        """Return the tensor that was saved, and begin to bring the next ones."""
        if isinstance(saved, Left):
            return saved.value()
        with self._lock, torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            task = torch._C._current_graph_task_id()
            if task < 0:  # nobody's backward: nothing will follow
                value = saved.value()
                if saved.slot not in self._ready:
                    saved.slot.release()
                return value
            saved.asked_in = task
            value = saved.value()
            self._make_ready(self._next_slots(saved, task))
            if saved.slot not in self._ready:
                saved.slot.release()
            if task != self._ends_at:
                self._ends_at = task
                torch.autograd.Variable._execution_engine.queue_callback(self._release_all)
            return value

    # -- forward ----------------------------------------------------------------------------

    def _moves(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
            return False  # its memory is that of other tensors
        return (
            tensor.device == self._device
            and not (tensor.is_conj() or tensor.is_neg())  # a flag beside the bytes
            and tensor.untyped_storage().nbytes() >= max(1, self._minimum_bytes)
            and not self._parameters.hold(tensor)
        )

    def _send(self, tensor: Tensor) -> Slot:
        """Begin to copy a tensor's storage out, once older copies leave room for it."""
        flying = [s for s in (ref() for ref in self._leaving) if s is not None and s.in_flight]
        total = tensor.untyped_storage().nbytes() + sum(s.size_bytes for s in flying)
        while flying and total > self._in_flight_bytes:
            total -= flying[0].size_bytes
            flying.pop(0).release()
        slot = Slot(tensor, self._streams)
        if total > self._in_flight_bytes:
            slot.release()
        else:
            flying.append(slot)
        self._leaving = [weakref.ref(s) for s in flying]
        return slot

    # -- backward ---------------------------------------------------------------------------

    def _next_slots(self, saved: Saved, task: int) -> list[Slot]:
        """Return what backward will most likely ask for next, as much as may be in flight."""
        slots: dict[Slot, None] = {}
        room = self._in_flight_bytes
        for place in range(saved.place - 1, -1, -1):
            before = self._order[place]()
            if before is None or before.asked_in == task or before.slot in slots:
                continue
            room -= before.slot.size_bytes
            if room < 0:
                break
            slots[before.slot] = None
        return list(slots)

    def _make_ready(self, slots: list[Slot]) -> None:
        """Hold these, and no others: not what was to come back, nor what has not yet left."""
        leaving = [s for s in (ref() for ref in self._leaving) if s is not None]
        for slot in (*self._ready, *leaving):
            if slot not in slots:
                slot.release()
        self._leaving.clear()
        self._ready = slots
        for slot in slots:
            slot.bring()

    def _release_all(self) -> None:
        with self._lock:
            self._make_ready([])
