"""Call an operator's function directly where nobody watches operators, and save the host's time.

PyTorch's dispatcher takes a custom operator through several layers of Python, as long as a kernel
runs for. What they are there for (tracers and fake tensors, compilers, checkpoints that choose by
operator, transforms, profilers) is asked for here, in a microsecond; if it is there, they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["call"]

_Results = TypeVar("_Results")


def call(
    operator: Callable[..., _Results],
    function: Callable[..., _Results],
    tensors: tuple[Tensor | None, ...],
    settings: tuple[Any, ...],
    written: tuple[Tensor | None, ...],
) -> _Results:
    """Return ``operator(*tensors, *settings)``, or what ``function``, its code, returns for them.

    Only where autograd does not record. ``written``: those of the tensors that are overwritten.
    Their versions are counted up, as the dispatcher would, so that autograd sees what became of
    what it kept.
    """
    if torch.compiler.is_compiling():  # alone and first: a compiler follows no further
        return operator(*tensors, *settings)
    if _is_watched() or not all(map(_is_plain, tensors)):
        return operator(*tensors, *settings)
    results = function(*tensors, *settings)
    torch._C._increment_version([t for t in written if t is not None])
    return results


def _is_watched() -> bool:
    """Whether somebody may be there to whom it matters which operators run."""
    return bool(
        torch._C._len_torch_dispatch_stack()  # tracers, fake tensors, selective checkpoints
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _is_plain(tensor: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing for ``tensor`` but to run the code."""
    return tensor is None or (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )
