"""Whether a user's network, loss and optimizer can be called as a step calls them, said before it.

A network is called with its inputs by position, a loss with (output, target) or the output alone,
an optimizer's ``step`` with nothing.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import MembenchError

__all__ = ["check_inputs", "check_loss_call", "check_step", "check_types", "takes_target"]

_Parameter = inspect.Parameter
# torch's words where two operands of one operator are of different types.
_TYPES = re.compile(r"same dtype|type \(\w+\)|expected (m1|scalar type|self)|dtype", re.IGNORECASE)
_BY_POSITION = (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)


def check_inputs(network: str, model: nn.Module, count: int) -> None:
    """Raise MembenchError unless ``model`` can be called with ``count`` inputs by position.

    A network with hooks before its forward is left alone: they may add arguments.
    """
    signature = _signature(model.forward)
    if signature is None or model._forward_pre_hooks:
        return
    needed = _needed_by_keyword(signature)
    if needed:
        raise MembenchError(
            f"network {network}: forward takes {', '.join(needed)} by keyword alone, and inputs "
            "are given by position: name a factory of a module whose forward hands them on, as "
            f"self.network({needed[0]}={needed[0]})"
        )
    if not _takes(signature, count):
        raise MembenchError(
            f"network {network}: forward{signature} cannot be called with "
            f"{_counted(count, 'input')}: give one for each argument, in their order"
        )


def check_types(model: nn.Module, inputs: Sequence[Tensor], said: str) -> None:
    """Raise MembenchError if an error that ``said`` so comes of inputs unlike all the weights."""
    weights = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    given = {t.dtype for t in inputs if t.dtype.is_floating_point}
    if len(weights) != 1 or not given - weights or not _TYPES.search(said):
        return
    (weight,), one = weights, min(map(_type_name, given - weights))
    spec = f"{'x'.join(map(str, inputs[0].shape))}:{_type_name(weight)}"
    raise MembenchError(
        f"the network's weights are {_type_name(weight)} and an input is {one}: give inputs of "
        f"that type, as --input {spec}, or float32 weights and a mixed precision"
    )


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_loss_call(name: str, loss: Callable[..., Any], count: int) -> None:
    """Raise MembenchError unless ``loss`` takes ``count`` arguments: (output, target) are two."""
    call = loss.forward if isinstance(loss, nn.Module) else loss
    signature = _signature(call)
    if signature is None or (not _needed_by_keyword(signature) and _takes(signature, count)):
        return
    given = ("nothing, to be made", "the output alone", "(output, target)")[count]
    raise MembenchError(
        f"loss {name!r} takes {signature}, and is called with {given}: give a function of (output, "
        "target) that calls it, as mypackage.losses:loss"
    )


def check_step(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise MembenchError if the optimizer's step wants a closure, as LBFGS does."""
    signature = _signature(optimizer.step)
    if signature is not None and not _takes(signature, 0):
        raise MembenchError(
            f"optimizer {name!r}: step{signature} cannot be called without arguments; one that "
            "runs the network anew, by a closure, is not followed: use another, such as adamw"
        )


def takes_target(loss: Any) -> bool:
    """Whether a loss takes (output, target) rather than the output alone."""
    signature = _signature(loss.forward if isinstance(loss, nn.Module) else loss)
    if signature is None:
        return True
    parameters = signature.parameters.values()
    starred = any(p.kind is _Parameter.VAR_POSITIONAL for p in parameters)
    return starred or sum(p.kind in _BY_POSITION for p in parameters) > 1


def _signature(call: Callable[..., Any]) -> inspect.Signature | None:
    """Return what ``call`` takes without its annotations, None of one written in C."""
    try:
        found = inspect.signature(call)
    except (TypeError, ValueError):
        return None
    bare = [p.replace(annotation=_Parameter.empty) for p in found.parameters.values()]
    return inspect.Signature(bare)


def _needed_by_keyword(signature: inspect.Signature) -> list[str]:
    return [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind is _Parameter.KEYWORD_ONLY and parameter.default is _Parameter.empty
    ]


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*(None,) * count)
    except TypeError:
        return False
    return True


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
