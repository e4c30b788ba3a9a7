"""What stands in a graph in place of a saved tensor: the tensor itself, or how to make it again.

Four kinds of node. ``Kept`` holds a tensor. ``Recipe`` holds another node and the modules whose
forwards lead from it to the value. ``Copy`` is the value of a node in another type or layout,
``View`` a part of it. None of them holds what it can make.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = [
    "Copy",
    "Geometry",
    "Hooks",
    "Kept",
    "Node",
    "Recipe",
    "Stage",
    "View",
    "geometry",
    "overwriting",
]

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]  # (pack, unpack) around a scope
Geometry = tuple[torch.Size, tuple[int, ...], int]  # sides, strides, offset in the storage

# Activations without an ``inplace`` of their own, and what overwrites a tensor with their result.
_OVERWRITE: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.GELU: lambda gelu, y: torch.ops.aten.gelu_(y, approximate=gelu.approximate),
    nn.Sigmoid: lambda _, y: y.sigmoid_(),
    nn.Tanh: lambda _, y: y.tanh_(),
}


class Node:
    """A value that backward can have. ``saves``: how many saved tensors will ask for it."""

    saves: int = 0
    source: Node | None = None  # what the value is made of

    def save(self) -> None:
        """Count one more saved tensor that this node stands for; the first time, its source too."""
        self.saves += 1
        if self.saves == 1 and self.source is not None:
            self.source.save()

    def value(self) -> Tensor:
        """Return the value, made again if it is not kept."""
        raise NotImplementedError


class Kept(Node):
    """A tensor as it is now: a change in place since is an error, as it is without hooks.

    Where other hooks surround the scope (offload, say), the tensor is theirs to keep.
    """

    def __init__(self, tensor: Tensor, hooks: Hooks | None = None) -> None:
        self.geometry = geometry(tensor)
        # detached, or a saved result would own the node that owns it; the version is shared
        self._tensor: Tensor | None = tensor.detach()
        self._version = tensor._version
        self._hooks = hooks
        self._packed: Any = None

    def save(self) -> None:
        """Count, and hand the tensor to the hooks around the scope the first time."""
        super().save()
        if self._hooks is not None and self._tensor is not None:
            self._packed = self._hooks[0](self._tensor)
            self._tensor = None

    def value(self) -> Tensor:
        """Return the tensor; RuntimeError if it has been changed in place since."""
        if self._tensor is None:
            assert self._hooks is not None
            return self._hooks[1](self._packed)
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a {self._tensor.dtype} tensor of shape "
                f"{tuple(self._tensor.shape)} is at version {self._tensor._version}, expected "
                f"version {self._version}; let nothing write into what a layer still needs"
            )
        return self._tensor


class Stage:
    """A module's forward, to be run again as it ran: same mode, buffers and autocast.

    Make it before the forward. What the second run does to buffers is done to copies, so running
    statistics change once.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self._modes = [(m, m.training) for m in module.modules()]
        # the statistics of the batch come out of the input; others must be remembered
        forgettable = isinstance(module, _NormBase) and module.training
        self._buffers = None if forgettable else _cloned_buffers(module)
        self._versions = [(p, p._version) for p in module.parameters()]
        kind = device.type
        self._autocast = (
            # no cache: a copy of a weight made here has no history
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False)
            if torch.amp.autocast_mode.is_autocast_available(kind)
            else None
        )

    def run(self, x: Tensor, overwrite: bool) -> Tensor:
        """Return the module's result again, over ``x`` if that may be lost and it can be done."""
        if any(p._version != version for p, version in self._versions):
            raise RuntimeError(
                f"a weight of {type(self.module).__name__} has been modified by an inplace "
                "operation since its forward, so that its result cannot be made again for "
                "backward: run backward before the optimizer's step"
            )
        with self._as_it_was(overwrite):
            in_place = _OVERWRITE.get(type(self.module)) if overwrite else None
            result: Tensor = in_place(self.module, x) if in_place else self.module.forward(x)
            return result

    @contextmanager
    def _as_it_was(self, overwrite: bool) -> Iterator[None]:
        # the caller has switched gradients off
        modes = [(m, m.training) for m, _ in self._modes]
        buffers = [(m, dict(m._buffers)) for m, _ in self._modes]
        remembered = (
            [originals for _, originals in buffers] if self._buffers is None else self._buffers
        )
        with torch.autocast(*self._autocast) if self._autocast else nullcontext():
            try:
                for module, training in self._modes:
                    module.training = training
                for (module, _), copies in zip(buffers, remembered, strict=True):
                    module._buffers.update({k: _clone(b) for k, b in copies.items()})
                with overwriting(self.module, overwrite):
                    yield
            finally:
                for module, training in modes:
                    module.training = training
                for module, originals in buffers:
                    module._buffers.update(originals)


class Recipe(Node):
    """The result of ``stages``, one after the other, from ``source``.

    ``own`` of its saves belong to the last stage itself, whose backward comes after that of
    every other reader.
    """

    source: Node

    def __init__(self, source: Node, stages: tuple[Stage, ...]) -> None:
        self.source, self.stages = source, stages
        self.own = 0
        self._alive: Callable[[], Tensor | None] = lambda: None
        self._task, self._asked = -1, 0

    def value(self) -> Tensor:
        """Return the result: the one that somebody still holds, or a new one."""
        result = self._alive()
        if result is None:
            with torch.no_grad():
                result = self.source.value()
                for index, stage in enumerate(self.stages):
                    result = stage.run(result, overwrite=index > 0)
            self._alive = _while_alive(result)
        return result

    def only_own_remain(self) -> bool:
        """Count that it was asked for; whether nobody but its own stage will ask once more."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._asked = task, 0
        self._asked += 1
        return 0 < self.saves - self._asked == self.own


class Copy(Node):
    """The value of ``source``, read in its logical order, in the type and layout of ``like``."""

    source: Node

    def __init__(self, source: Node, like: Tensor) -> None:
        self.source = source
        self._size, self._stride = like.shape, like.stride()
        self._dtype, self._device = like.dtype, like.device

    def value(self) -> Tensor:
        """Return a new copy."""
        with torch.no_grad():
            value = self.source.value()
            made = torch.empty_strided(
                self._size, self._stride, dtype=self._dtype, device=self._device
            )
            return made.copy_(value.reshape(self._size))


class View(Node):
    """Part of the storage of ``source``, which had the geometry ``of``."""

    source: Node

    def __init__(self, source: Node, of: Geometry, like: Tensor) -> None:
        self.source, self._of, self._like = source, of, geometry(like)

    def value(self) -> Tensor:
        """Return the view, of a copy where the value's layout is not that of old."""
        value = self.source.value()
        size, stride, offset = self._of
        with torch.no_grad():
            if value.stride() != stride:
                made = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
                value = made.copy_(value)
            sides, strides, start = self._like
            return value.as_strided(sides, strides, value.storage_offset() + start - offset)


def geometry(tensor: Tensor) -> Geometry:
    """Return the tensor's sides, strides and offset."""
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


@contextmanager
def overwriting(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Let an activation that has an ``inplace`` overwrite its input."""
    before = getattr(module, "inplace", None)
    if not wanted or not isinstance(before, bool):
        yield
        return
    module.inplace = True  # type: ignore[assignment]
    try:
        yield
    finally:
        module.inplace = before  # type: ignore[assignment]


def _cloned_buffers(module: nn.Module) -> list[dict[str, Tensor | None]]:
    return [{k: _clone(b) for k, b in m._buffers.items()} for m in module.modules()]


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _while_alive(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Return what gives ``tensor`` as long as anybody holds its storage, and then None.

    The storage and not the tensor is watched: autograd wraps what it is given in tensors of its
    own.
    """
    storage = weakref.ref(tensor.untyped_storage())
    dtype, device, (size, stride, offset) = tensor.dtype, tensor.device, geometry(tensor)

    def alive() -> Tensor | None:
        held = storage()
        if held is None:
            return None
        with torch.no_grad():
            empty = torch.empty(0, dtype=dtype, device=device)
            return empty.set_(held, offset, size, stride)

    return alive
