"""Who reads what in a network's forward: calls, and the values between them.

Two ways lead to a ``Dataflow``: a run on tensors without memory (``dataflow_run.py``) and a
symbolic trace (``dataflow_symbolic.py``). What is concluded from it is in ``pairs.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["FORWARD_ERRORS", "Call", "Dataflow", "Value", "is_leaf", "is_memsave_class"]

# What somebody else's forward may raise where it cannot be traced: anything but an exit.
FORWARD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(eq=False, slots=True)
class Value:
    """A tensor's contents, until something writes over them."""

    producer: Call | None = None  # None: an input, a parameter, or made out of sight
    readers: list[Call] = field(default_factory=list)
    is_input: bool = False  # of what was traced
    is_result: bool = False  # of what was traced
    handed_on: bool = False  # through a layer that does nothing, such as dropout with p=0
    nbytes: int | None = None


@dataclass(eq=False, slots=True)
class Call:
    """One call of a layer, or of a function in some module's forward."""

    operation: str  # a layer's class name, or a function's name: "Conv3d", "leaky_relu"
    module: str | None  # the layer's name in the model; None for a function
    owner: str  # the module in whose forward it was called
    argument: Value | None = None  # the first tensor
    result: Value | None = None  # the first tensor returned
    overwrites: Value | None = None  # what a call in place wrote over
    parameters: tuple[Any, ...] = ()  # a function's arguments that are no tensors, in order

    @property
    def place(self) -> str:
        """Where it is, for people: the layer's name, or the function and whose forward calls it."""
        if self.module is not None:
            return self.module
        return f"{self.operation} in {self.owner or 'the forward'}"


@dataclass(eq=False, slots=True)
class Dataflow:
    """All calls of one forward, in order."""

    calls: list[Call] = field(default_factory=list)
    part: str | None = None  # what was traced: None for the whole model

    def of_module(self, name: str) -> list[Call]:
        """Return the calls of the layer called ``name``."""
        return [call for call in self.calls if call.module == name]


def is_memsave_class(kind: type) -> bool:
    """Whether ``kind`` is a class of this package."""
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of ``module`` is one step: a layer of torch's, a norm, or a layer of ours."""
    if isinstance(module, _CONTAINERS) or next(module.children(), None) is not None:
        return False
    kind = type(module)
    return (
        kind.__module__.startswith("torch.nn.")
        or is_memsave_class(kind)
        or isinstance(module, _NORMS)
    )


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (_NormBase, nn.GroupNorm)  # a subclass has a forward of its own, and is told apart later
