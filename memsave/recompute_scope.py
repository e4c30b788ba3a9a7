"""The scope in which saved tensors are looked at: a known result is kept as its recipe.

Autograd hands every tensor that an operation saves to the hooks of the scope. A result of a
``RecomputedNormAct`` is known by its storage and version, so also through views, and no longer
after a change in place; its copy in another type, as autocast makes for a convolution, by the
nodes that autograd put between the two.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node as GradNode

from memsave.recompute_nodes import (
    Copy,
    Geometry,
    Hooks,
    Kept,
    Node,
    Recipe,
    Stage,
    View,
    geometry,
    overwriting,
)

__all__ = ["Scope", "active_hooks", "active_scope"]

# Operations that change type, layout or sides, but neither values nor their order.
_COPIES = ("ToCopyBackward0", "CloneBackward0")
_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


_Edge = tuple[GradNode, int]  # a node of the graph and which of its results


@dataclass(slots=True, eq=False)
class _Entry:
    """A live tensor that the scope knows, without holding it."""

    node: Node
    version: int
    dtype: torch.dtype
    geometry: Geometry
    edge: _Edge | None  # what autograd made it with
    tensor: weakref.ref[Tensor]
    storage: weakref.ref[Any] | None = None  # its death ends the entry


@dataclass(slots=True, eq=False)
class _Saved:
    """What autograd holds in place of a saved tensor."""

    node: Node


@dataclass(slots=True, eq=False)
class _Watched:
    """What one of the pair's modules saved: held as it is until the module is done."""

    saved: _Saved
    known: Node | None  # what stands for it if the module leaves its input alone
    storage: int
    version: int
    geometry: Geometry

    def settle(self, node: Node | None) -> None:
        """Let ``node`` stand for it, or leave it as it is."""
        if node is not None:
            self.saved.node = node
        self.saved.node.save()


class Scope:
    """What is known in one ``recompute`` scope; ``pack`` and ``unpack`` are its hooks."""

    def __init__(self, outer: Hooks | None) -> None:
        self._outer = outer
        self._entries: dict[int, _Entry] = {}  # by storage
        self._by_edge: dict[_Edge, _Entry] = {}
        self._watched: list[_Watched] | None = None
        self._held: tuple[Recipe, Tensor, int] | None = None  # and the node that it was made for
        self._ends_at = -1  # the backward at whose end nothing is held any more

    def pack(self, tensor: Tensor) -> _Saved:
        """Return what to keep of a tensor that an operation saves."""
        known = self._known(tensor) if tensor.layout == torch.strided else None
        if self._watched is None or tensor.layout != torch.strided:
            saved = _Saved(known or self._kept(tensor))
            saved.node.save()
            return saved
        saved = _Saved(self._kept(tensor))
        self._watched.append(
            _Watched(saved, known, _key(tensor), tensor._version, geometry(tensor))
        )
        return saved

    def unpack(self, saved: _Saved) -> Tensor:
        """Return the tensor that was saved."""
        node = saved.node
        if not isinstance(node, Recipe):
            if self._held is not None and self._held[2] != _running_node():
                self._drop()  # something else runs now, and not the recipe's own stage
            return node.value()
        held, self._held = self._held, None
        value = held[1] if held is not None and held[0] is node else None
        del held  # before anything new is made
        if value is None:
            value = node.value()
        if node.only_own_remain():
            self._hold(node, value)
        return value

    def run(self, first: nn.Module, second: nn.Module, x: Tensor, overwrite: bool) -> Tensor:
        """Return ``second(first(x))``, and know it from now on.

        ``overwrite``: the second may write over the first's result.
        """
        known, whole = self._entry(x), self._entries.get(_key(x))
        start = known or self._know(x, self._known(x) or self._kept(x))
        try:
            y, y_entry = self._first(first, start, x)
        finally:
            if known is None:
                self._forget(_key(x), start)
            if whole is not None:  # x was a part of a result, which is still to be known
                self._entries.setdefault(_key(x), whole)
        temporary = self._entries.get(_key(y)) is not y_entry
        if temporary:
            self._put(_key(y), y_entry)
        try:
            return self._second(second, y_entry, y, overwrite and _key(y) != _key(x))
        finally:
            if temporary or isinstance(y_entry.node, Kept):
                self._forget(_key(y), y_entry)

    def close(self) -> None:
        """Know nothing any more; what is saved keeps its recipes."""
        for entry in {
            id(e): e for e in (*self._entries.values(), *self._by_edge.values())
        }.values():
            entry.storage = None  # a reference whose callback holds the entry: a cycle
        self._entries.clear()
        self._by_edge.clear()

    # -- the pair ---------------------------------------------------------------------------

    def _first(self, module: nn.Module, start: _Entry, x: Tensor) -> tuple[Tensor, _Entry]:
        """Run the first module; its result can be made again if the module keeps its input."""
        stage = Stage(module, x.device)
        saves = start.node.saves
        result, own = self._watch(module, x, start.version)
        unchanged = x._version == start.version
        if unchanged and _key(result) == _key(x) and geometry(result) == start.geometry:
            return result, start  # nothing was done
        if unchanged and _key(result) != _key(x) and start.node.saves > saves:
            recipe = Recipe(start.node, (stage,))
            _settle(own, recipe)
            return result, self._know(result, recipe)
        kept = own[0].saved.node if own else self._kept(result)
        _settle(own, kept)
        return result, self._know(result, kept)

    def _second(self, module: nn.Module, start: _Entry, y: Tensor, overwrite: bool) -> Tensor:
        """Run the second module and know its result, if its input is kept or can be made."""
        stage = Stage(module, y.device)
        with overwriting(module, overwrite and not y._is_view()):
            result, own = self._watch(module, y, start.version)
        recipe = None
        if result.requires_grad:
            if isinstance(start.node, Recipe):
                recipe = Recipe(start.node.source, (*start.node.stages, stage))
            elif start.node.saves > 0 and _key(result) != _key(y):
                recipe = Recipe(start.node, (stage,))
        _settle(own, recipe)
        if recipe is not None:
            recipe.own = len(own)
            self._know(result, recipe)
        return result

    def _watch(self, module: nn.Module, x: Tensor, version: int) -> tuple[Tensor, list[_Watched]]:
        """Run the module; return with its result the savings of that very result, unsettled."""
        before, self._watched = self._watched, []
        try:
            result = module(x)
            watched = self._watched
        finally:
            self._watched = before
        is_result = (_key(result), result._version, geometry(result))
        own = [w for w in watched if (w.storage, w.version, w.geometry) == is_result]
        if _key(result) == _key(x) and result._version == version:
            own = []
        for w in watched:
            if w not in own:
                w.settle(w.known if x._version == version else None)
        return result, own

    # -- knowledge --------------------------------------------------------------------------

    def _kept(self, tensor: Tensor) -> Kept:
        return Kept(tensor, self._outer)

    def _known(self, tensor: Tensor) -> Node | None:
        """Return what can stand for ``tensor``, if anything is known of it."""
        entry = self._entries.get(_key(tensor))
        if entry is None:
            entry = self._copied(tensor)
            return None if entry is None else Copy(entry.node, tensor)
        if tensor._version != entry.version or tensor.dtype != entry.dtype:
            return None
        if geometry(tensor) == entry.geometry:
            return entry.node
        if not _contains(entry.geometry, geometry(tensor)):
            return None  # it reads elements of the storage that the node does not give
        return View(entry.node, entry.geometry, tensor)

    def _copied(self, tensor: Tensor) -> _Entry | None:
        """Return the entry that ``tensor`` is nothing but a copy of, if there is one.

        A change without gradients leaves no trace in the graph, but in the versions of the two.
        So one copy at most: of something between two copies nobody would know.
        """
        if not self._by_edge or tensor._version != 0:
            return None
        grad_fn, copies = tensor.grad_fn, 0
        while grad_fn is not None and grad_fn.name() in (*_COPIES, *_RESHAPES):
            copies += grad_fn.name() in _COPIES
            if copies > 1:
                return None
            edge = cast(_Edge, grad_fn.next_functions[0])
            if edge in self._by_edge:
                entry = self._by_edge[edge]
                original = entry.tensor()
                unchanged = original is not None and original._version == entry.version
                return entry if unchanged else None
            grad_fn = edge[0]
        return None

    def _entry(self, tensor: Tensor) -> _Entry | None:
        entry = self._entries.get(_key(tensor))
        same = (
            entry is not None
            and (entry.version, entry.dtype) == (tensor._version, tensor.dtype)
            and entry.geometry == geometry(tensor)
        )
        return entry if same else None

    def _know(self, tensor: Tensor, node: Node) -> _Entry:
        key = _key(tensor)
        edge = None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)
        entry = _Entry(
            node, tensor._version, tensor.dtype, geometry(tensor), edge, weakref.ref(tensor)
        )
        entry.storage = weakref.ref(tensor.untyped_storage(), lambda _: self._forget(key, entry))
        self._put(key, entry)
        return entry

    def _put(self, key: int, entry: _Entry) -> None:
        self._entries[key] = entry
        if entry.edge is not None:
            self._by_edge[entry.edge] = entry

    def _forget(self, key: int, entry: _Entry) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]
        if entry.edge is not None and self._by_edge.get(entry.edge) is entry:
            del self._by_edge[entry.edge]
        entry.storage = None  # a reference whose callback holds the entry: a cycle

    # -- backward ---------------------------------------------------------------------------

    def _hold(self, recipe: Recipe, value: Tensor) -> None:
        """Hold ``value`` until another node asks for anything: its own stage's, most likely."""
        task = torch._C._current_graph_task_id()
        if task < 0:  # nobody's backward: nothing would follow
            return
        self._held = (recipe, value, _running_node())
        if task != self._ends_at:
            self._ends_at = task
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._drop)

    def _drop(self) -> None:
        self._held = None


def active_hooks() -> Hooks | None:
    """Return the hooks that saved tensors go to at this point, if any."""
    return cast(Hooks | None, torch._C._autograd._top_saved_tensors_default_hooks(False))


def active_scope() -> Scope | None:
    """Return the scope whose hooks saved tensors go to, if they go to one's."""
    hooks = active_hooks()
    owner = getattr(hooks[0], "__self__", None) if hooks is not None else None
    return owner if isinstance(owner, Scope) else None


def _key(tensor: Tensor) -> int:
    # the address of the storage's own object: fake tensors have one too, and no data
    return int(tensor.untyped_storage()._cdata)


def _contains(whole: Geometry, part: Geometry) -> bool:
    """Whether ``whole`` has no gaps, and every element of ``part`` lies in it."""
    size, _, offset = whole
    elements = _span(whole)
    return (
        elements == size.numel() and offset <= part[2] <= part[2] + _span(part) <= offset + elements
    )


def _span(of: Geometry) -> int:
    """Return how many elements of its storage a tensor stretches over."""
    size, stride, _ = of
    if size.numel() == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _running_node() -> int:
    """Return the number of the node whose backward runs, -1 outside of one."""
    node: Any = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


def _settle(own: list[_Watched], node: Node | None) -> None:
    for watched in own:
        watched.settle(node)
