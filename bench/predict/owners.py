"""Whose a parameter, gradient or optimizer state is: the module that owns the parameter.

None of them is made while a module runs, so the tracer alone would know only the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.predict.tracer import Tracer

__all__ = ["categorise_gradients", "categorise_parameters", "categorise_state"]


def categorise_parameters(tracer: Tracer, model: nn.Module) -> None:
    """Say that ``model``'s live parameters and buffers are ``"parameter"``, and whose."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tracer.categorise(iter((tensor,)), "parameter", _owner(name))


def categorise_gradients(tracer: Tracer, model: nn.Module) -> None:
    """Say that what the parameters have as ``grad`` is ``"gradient"``, and whose."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tracer.categorise(iter((parameter.grad,)), "gradient", _owner(name))


def categorise_state(tracer: Tracer, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Say that what ``optimizer`` keeps is ``"optimizer_state"``, and for whose parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    saved = optimizer.state_dict()
    # A state dict numbers the parameters in the order of their groups.
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    owners = {
        number: _owner(names.get(id(parameter), ""))
        for number, parameter in zip(numbers, parameters, strict=False)
    }
    for number, state in saved["state"].items():
        tracer.categorise(_tensors(state), "optimizer_state", owners.get(number))


def _owner(name: str) -> str:
    """Return ``encoder.0.conv1`` of the parameter ``encoder.0.conv1.weight``."""
    return name.rpartition(".")[0]


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
