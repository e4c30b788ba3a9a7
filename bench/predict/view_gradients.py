"""Gradients of views that were written in place: given room of their own, watched or not.

Where a view of a tensor is changed in place, as by the activation after an instance norm, autograd
makes the view anew as a strided window of what it is a view of, and that window's backward gives
the gradient a storage of its own. Of tensors that Python dispatches, fake ones among them, it keeps
how the view was made instead, whose backward is a view of the gradient and takes nothing. A step
that is traced would then hold one gradient less than the same step on a card; here the window's
storage is taken again.

Seen on torch 2.11 and 2.13: ``AsStridedBackward0`` where the traced step has ``ViewBackward0``.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["ViewGradients"]

# Backward of these gives a view of the gradient it is given; others have a result of their own.
_ALIASES: Final = frozenset(
    {
        "AliasBackward0",
        "PermuteBackward0",
        "SqueezeBackward0",
        "SqueezeBackward1",
        "SqueezeBackward2",
        "TBackward0",
        "TransposeBackward0",
        "UnsafeViewBackward0",
        "UnsqueezeBackward0",
        "ViewBackward0",
    }
)
_WRITTEN: Final = "torch::autograd::CopySlices"
_LONGEST_CHAIN: Final = 32  # of views of views


class ViewGradients:
    """Must be shown every operator's arguments before it runs, see ``operator``."""

    def __init__(self) -> None:
        self._written: list[weakref.ref[FakeTensor]] = []

    def operator(self, func: Any, args: tuple[Any, ...]) -> None:
        """Note a view that ``func`` is about to write; see to those written before."""
        if self._written and not _makes_view(func):
            self._mend()
        if func._schema.is_mutable and args and isinstance(args[0], FakeTensor):
            written = args[0]
            if written._is_view() and torch.is_grad_enabled():
                self._written.append(weakref.ref(written))

    def _mend(self) -> None:
        written, self._written = self._written, []
        for reference in written:
            view = reference()
            if view is not None and view._is_view() and view.requires_grad:
                node = view.grad_fn
                if node is not None and _is_window(node):
                    node.register_hook(_own_storage)


def _makes_view(func: Any) -> bool:
    """Whether it may be autograd that makes a view anew, with a lock held on the view's node."""
    returns = func._schema.returns
    return bool(returns and returns[0].alias_info is not None and not func._schema.is_mutable)


def _is_window(node: Any) -> bool:
    """Whether only views lie between the node and the note that their base was written."""
    for _ in range(_LONGEST_CHAIN):
        if node.name() not in _ALIASES:
            return False
        node = node.next_functions[0][0]
        if node is None or node.name() == _WRITTEN:
            return node is not None
    return False


def _own_storage(
    gradients: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else gradient.clone() for gradient in gradients)
