"""Passes over an activation: how often a step reads or writes all of it, counted.

Of our kernels every load and store is seen, under Triton's interpreter. Of PyTorch's operators a
rule gives the passes, which is a lower bound for any kernel whose activation outgrows the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["RULES", "Passes", "counted", "passes_of_operators"]

# (reads, writes) of an activation's size. A norm needs all values for its statistics before it
# writes the first result, and all gradients for their sums before it writes the first of x.
RULES = {
    "native_batch_norm": (2, 1),
    "leaky_relu_": (1, 1),
    "leaky_relu_backward": (2, 1),  # reads dz and z
    "native_batch_norm_backward": (4, 1),  # dz and x, twice
}


@dataclass(slots=True)
class Passes:
    """Elements read from and written to some tensors of one size."""

    tensors: tuple[Tensor, ...]
    read: int = 0
    written: int = 0
    elsewhere: int = field(default=0)  # statistics, parameters

    @property
    def total(self) -> float:
        """Passes over one of the tensors."""
        return (self.read + self.written) / self.tensors[0].numel()

    def inside(self, addresses: Any, mask: Any) -> int:
        """Return how many of the addresses lie in the tensors; the others are counted."""
        asked = addresses[mask]
        hits = 0
        for tensor in self.tensors:
            first = tensor.data_ptr()
            hits += int(np.sum((asked >= first) & (asked < first + tensor.nbytes)))
        self.elsewhere += asked.size - hits
        return hits


@contextmanager
def counted(*tensors: Tensor) -> Iterator[Passes]:
    """Count what interpreted kernels load from and store to ``tensors``, which are dense."""
    from triton.runtime.interpreter import InterpreterBuilder

    passes = Passes(tensors)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        passes.read += passes.inside(pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        passes.written += passes.inside(pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield passes


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the operators that read a tensor of ``shape`` and do more than look at it."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.names = shape, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        sizes = [a.shape for a in args if isinstance(a, Tensor)]
        if self.shape in sizes and func is not torch.ops.aten.detach.default:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def passes_of_operators(layer: nn.Module, x: Tensor, dz: Tensor) -> tuple[list[str], int]:
    """Return the operators of ``layer``, forward and backward, and their passes by the rules."""
    leaf = x.clone().requires_grad_()
    with _Operators(x.shape) as seen:
        torch.autograd.backward(layer(leaf), dz)
    return seen.names, sum(sum(RULES[name]) for name in seen.names)
