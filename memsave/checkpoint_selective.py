"""Selective checkpointing: keep what convolutions give, run norms and activations again.

A convolution is dear to run twice and its result is one tensor; the norm and the activation behind
it are cheap and give two more. So a block keeps its input and the results of its convolutions, and
backward makes the rest again from them.

Source: selective recomputation of Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", arXiv:2205.05198;
``torch.utils.checkpoint.create_selective_checkpoint_contexts``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from memsave.checkpoint import Contexts, _Checkpointed, _contexts, _run
from memsave.errors import RefusedError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm

__all__ = ["checkpoint_selective"]

_aten = torch.ops.aten
_KEPT = frozenset({_aten.convolution, _aten._convolution, _aten.mm, _aten.addmm, _aten.bmm})
_OVERWRITING_NORMS = (InPlaceABN, InPlaceGroupNorm, InPlaceInstanceNorm)


def checkpoint_selective(module: nn.Module) -> nn.Module:
    """Make ``module`` keep its convolutions' results and recompute the rest; return the same one.

    Only its class changes, to a subclass, so parameters, state-dict keys and hooks stay. Do it to
    the blocks of a network and not to the whole: what one region recomputes is alive at once.

    Shapes: those of the module.
    Memory: keeps the module's inputs and the result of every convolution and matrix product, and
        so for n pairs of convolution and norm n results beside the input, instead of 2n or 3n. One
        block's norms and activations live while backward runs it. In-place activations work on
        copies meanwhile, since they would overwrite what is kept.
    Exact: results and gradients are the module's own, bit for bit; dropout draws the same masks
        and running statistics are updated once. No convolution runs twice. Under autocast the
        gradients of a module that is called more than once are summed in the weights' own type,
        where the plain module's are summed in the narrow one.
    Errors: RefusedError for a module with in-place norms, which overwrite the convolutions'
        results (they save the same bytes by themselves), and for one that is checkpointed
        already. RuntimeError from torch, in backward, if a function in its forward overwrites
        such a result, as ``F.relu_`` does, and for a second backward.
    """
    if isinstance(module, _Selective):
        return module
    name = type(module).__name__
    if any(isinstance(part, _Checkpointed | _Selective) for part in module.modules()):
        raise RefusedError(
            f"{name} is checkpointed already, it or a part of it: choose one of the two for a block"
        )
    if any(isinstance(part, _OVERWRITING_NORMS) for part in module.modules()):
        raise RefusedError(
            f"{name} has in-place norms, which overwrite the convolutions' results that "
            "checkpoint_selective keeps: leave it out, they save the same bytes, or use plain norms"
        )
    module.__class__ = _selective_class(type(module))  # type: ignore[arg-type]
    return module


class _Selective(nn.Module):
    """The part of the module's class that is ours; the other is its own class."""

    recomputes_selectively = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run(super().forward, [self], args, kwargs, _selective_contexts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle or a deep copy goes through the module's own.
        return _restore, (type(self).__mro__[2],), self.__dict__.copy()


@functools.cache
def _selective_class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Selective{plain.__name__}", (_Selective, plain), {"__doc__": plain.__doc__})


def _restore(plain: type[nn.Module]) -> nn.Module:
    made: type[nn.Module] = _selective_class(plain)  # type: ignore[arg-type]
    return made.__new__(made)


def _keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = getattr(operator, "overloadpacket", None) in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts(modules: Sequence[nn.Module]) -> Contexts:
    make: Any = create_selective_checkpoint_contexts
    forward, recomputation = make(_keep_products)
    return (
        _together(_on_copies(modules), _casting_anew(), forward),
        # The statistics first: their copies are not among the operations that forward ran.
        _together(_contexts(modules)[1], _on_copies(modules), _casting_anew(), recomputation),
    )


@contextmanager
def _together(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        yield


@contextmanager
def _casting_anew() -> Iterator[None]:
    """Let autocast cast each weight here, whether or not it did so before.

    A module that is called twice would find its weights cast the second time, but not when that
    call is run again: one operation more than forward had, which torch refuses.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _on_copies(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let in-place activations give a new tensor."""
    parts = [part for module in modules for part in module.modules()]
    in_place = [part for part in parts if getattr(part, "inplace", False) is True]
    for part in in_place:
        part.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in in_place:
            part.inplace = True  # type: ignore[assignment]
