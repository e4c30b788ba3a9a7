"""Checkpointing: keep a region's input alone, and run its forward again when backward comes to it.

Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
arXiv:1604.06174; recurrent steps: Gruslys et al., NIPS 2016, arXiv:1606.03401. What is here adds
to ``torch.utils.checkpoint`` (non-reentrant) what these networks need: running statistics updated
once, and a clear error for a region that overwrites its own input.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from memsave.errors import InputError, OptionError, RefusedError

__all__ = ["CheckpointedSequence", "checkpoint_block", "checkpoint_sequence", "checkpoint_steps"]

State = TypeVar("State")
Output = TypeVar("Output")
Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def checkpoint_block(module: nn.Module) -> nn.Module:
    """Make ``module`` recompute its forward in backward; return the same module.

    Only its class changes, to a subclass, so parameters, state-dict keys and hooks stay.
    A module that is checkpointed already is left as it is.

    Shapes: those of the module.
    Memory: keeps the module's inputs, and its result where a later operation needs it; one
        block's activations live while backward runs it.
    Exact: results and gradients are the module's own: dropout draws the same masks, autocast is
        as it was, running statistics are updated once.
    Errors: InputError if the forward overwrites its own input, which could not be run again.
        RefusedError for a module that ``checkpoint_selective`` has changed.
        RuntimeError from autograd, in backward, if somebody else has overwritten it since.
    """
    if getattr(module, "recomputes_selectively", False):
        raise RefusedError(
            f"{type(module).__name__} recomputes its norms already: choose one of checkpoint and "
            "checkpoint_selective for a block"
        )
    if not isinstance(module, _Checkpointed):
        module.__class__ = _checkpointed_class(type(module))  # type: ignore[arg-type]
    return module


def checkpoint_sequence(
    modules: nn.Sequential | Iterable[nn.Module], segments: int
) -> nn.Sequential:
    """Return the modules as one ``nn.Sequential`` that keeps the inputs of its segments only.

    The modules are split into ``segments`` runs of equal length, the first ones longer by one
    where it does not come out even. The last run is not recomputed: backward would start with it
    at once. Names, and so state-dict keys, are those of the sequence given.

    Memory: keeps the first input of each of the first ``segments - 1`` runs, and what the last
        run keeps by itself. About sqrt(n) segments for n equal modules need least.
    Exact, Errors: as ``checkpoint_block``; OptionError unless 1 <= segments <= modules.
    """
    if isinstance(modules, nn.Sequential):
        named = OrderedDict(modules.named_children())
    else:
        named = OrderedDict((str(i), module) for i, module in enumerate(modules))
    return CheckpointedSequence(named, segments)


def checkpoint_steps(
    step: Callable[[State, Tensor], tuple[State, Output]],
    every: int,
    modules: Sequence[nn.Module] = (),
) -> Callable[[State, Iterable[Tensor]], tuple[State, list[Output]]]:
    """Return a function that runs a recurrent ``step`` along a sequence, keeping every k-th state.

    ``step(state, x_t)`` returns ``(state, output)``; the returned function takes the first state
    and the inputs, one a step, and returns the last state and the outputs. A state is a tensor,
    or a tuple, list or dict of tensors. Where ``step`` is not a module or a module's method, name
    in ``modules`` those whose running statistics it updates.

    Memory: keeps the inputs, the outputs and one state for every ``every`` steps; the activations
        of ``every`` steps live while backward runs them.
    Exact, Errors: as ``checkpoint_block``; OptionError if ``every`` is less than 1.
    """
    if every < 1:
        raise OptionError(f"every must be 1 or more steps, got {every}")
    owner = getattr(step, "__self__", step)
    regions = [*modules, *([owner] if isinstance(owner, nn.Module) else [])]

    def some_steps(state: State, *inputs: Tensor) -> tuple[State, list[Output]]:
        outputs = []
        for x in inputs:
            state, output = step(state, x)
            outputs.append(output)
        return state, outputs

    def run(state: State, inputs: Iterable[Tensor]) -> tuple[State, list[Output]]:
        outputs: list[Output] = []
        remaining = iter(inputs)
        while group := tuple(itertools.islice(remaining, every)):
            state, of_group = _run(some_steps, regions, (state, *group))
            outputs += of_group
        return state, outputs

    return run


class CheckpointedSequence(nn.Sequential):
    """What ``checkpoint_sequence`` returns."""

    def __init__(self, modules: OrderedDict[str, nn.Module], segments: int) -> None:
        if not 1 <= segments <= len(modules):
            raise OptionError(
                f"segments must be from 1 to {len(modules)} (modules), got {segments}"
            )
        super().__init__(modules)
        self.segments = segments

    def forward(self, input: Any) -> Any:
        """Run the segments, all but the last one checkpointed."""
        modules = list(self)
        size, longer = divmod(len(modules), self.segments)
        for segment in range(self.segments - 1):
            length = size + (segment < longer)
            run, modules = modules[:length], modules[length:]
            input = _run(functools.partial(_in_order, run), run, (input,))
        return _in_order(modules, input)


def _in_order(modules: list[nn.Module], input: Any) -> Any:
    for module in modules:
        input = module(input)
    return input


class _Checkpointed(nn.Module):
    """The part of a checkpointed module's class that is ours; the other is its own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run(super().forward, [self], args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle or a deep copy goes through the module's own.
        return _restore, (type(self).__mro__[2],), self.__dict__.copy()


@functools.cache
def _checkpointed_class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Checkpointed{plain.__name__}", (_Checkpointed, plain), {"__doc__": plain.__doc__})


def _restore(plain: type[nn.Module]) -> nn.Module:
    made: type[nn.Module] = _checkpointed_class(plain)  # type: ignore[arg-type]
    return made.__new__(made)


def _run(
    function: Callable[..., Any],
    modules: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    contexts: Callable[[Sequence[nn.Module]], Contexts] | None = None,
) -> Any:
    """Call ``function`` as one checkpointed region, whose norms are those of ``modules``.

    ``contexts`` gives those of the forward and of its recomputation, which leave the norms'
    statistics alone unless told otherwise.
    """
    kwargs = kwargs or {}
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    make = contexts or _contexts
    # Tensors one by one: torch holds those inside of a tuple or a dict outright, past the hooks of
    # a region around this one, which then keeps what it should make again.
    leaves, form = tree_flatten((args, kwargs))
    inputs = [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor)]

    def on_leaves(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, form)
        return function(*args, **kwargs)

    result = checkpoint(on_leaves, *leaves, use_reentrant=False, context_fn=lambda: make(modules))
    if any(tensor._version != version for tensor, version in inputs):
        raise InputError(
            "a checkpointed region overwrites its own input, so that it cannot be run again: let "
            "it start with an operation that does not, a convolution and not an in-place one"
        )
    return result


def _contexts(modules: Sequence[nn.Module]) -> Contexts:
    return nullcontext(), _statistics_untouched(modules)


@contextmanager
def _statistics_untouched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let norms update copies of their running statistics, of C elements, thrown away after.

    Copies rather than no statistics: torch compares what the recomputation keeps with what the
    forward kept, and BatchNorm keeps the statistics too.
    """
    found = (n for module in modules for n in module.modules() if isinstance(n, _NormBase))
    norms = dict.fromkeys(found)  # each once, in an order that does not change from run to run
    buffers = [(norm, dict(norm._buffers)) for norm in norms if norm.training]
    try:
        for norm, originals in buffers:
            for name, buffer in originals.items():
                norm._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for norm, originals in buffers:
            norm._buffers.update(originals)
