"""A test's own code traced as it runs: no model is announced, so models are met as they are called.

A module that is called from no other one is a model: its submodules get their dotted names from
it, its parameters, gradients and optimizer state their categories.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.errors import MembenchError
from bench.predict.owners import categorise_gradients, categorise_parameters, categorise_state
from bench.predict.step_trace import Site
from bench.predict.tracer import Tracer

__all__ = ["NO_GPU", "ModelTracer", "tracing"]

NO_GPU = (
    "this needs a GPU, and without a C++ compiler membench has no stand-in for one (see membench "
    'doctor): install g++, or take "cuda" if torch.cuda.is_available() else "cpu" in the test'
)


class ModelTracer(Tracer):  # type: ignore[no-untyped-call]
    """A tracer that learns the models of a test from their first calls."""

    def __init__(self, device_type: str) -> None:
        super().__init__(device_type)
        self._models: list[weakref.ref[nn.Module]] = []  # a model may die before the test ends

    def models(self) -> list[nn.Module]:
        """Return the models met so far that are still there."""
        return [model for ref in self._models if (model := ref()) is not None]

    def backward_begins(self) -> None:
        """Know that what lives now and was not said to be anything else is an activation."""
        self.categorise_live_temporaries("activation", since=0)

    def backward_ended(self) -> None:
        """Know the gradients."""
        for model in self.models():
            categorise_gradients(self, model)

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Know the optimizer's state."""
        for model in self.models():
            categorise_state(self, model, optimizer)

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if not self._module_stack and torch._C._current_autograd_node() is None:
            self._meet(module, args)
        super()._enter_module(module, args)

    def _record_tensor(self, tensor: Tensor, site: Site, kept_bytes: int = 0) -> None:
        # Made all the same, it would be counted by nobody, and any limit passed.
        if self.device_type == "cpu" and tensor.device.type == "cuda":
            raise MembenchError(NO_GPU)
        super()._record_tensor(tensor, site, kept_bytes)

    def _meet(self, model: nn.Module, args: Any) -> None:
        # Losses and single layers are called by themselves too, and keep the name of their type.
        names = {id(part): name for name, part in model.named_modules() if name}
        self._module_names.update({id(model): type(model).__name__, **names})
        if all(known is not model for known in self.models()):
            self._models.append(weakref.ref(model))
        categorise_parameters(self, model)
        given = (a for a in args if isinstance(a, Tensor) and a.grad_fn is None)
        self.categorise((a for a in given if not isinstance(a, nn.Parameter)), "input")


class _FakeTensors(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors that never touch a device, though torch.cuda says that there is one."""

    avoid_device_init = True  # torch would ask torch.cuda.is_available()


@contextmanager
def tracing(device_type: str) -> Iterator[ModelTracer]:
    """Run what is within on fake tensors, under the tracer that is given out."""
    with ExitStack() as within:
        # Tensors that were made before, as the module was imported, are real ones.
        within.enter_context(_FakeTensors(allow_non_fake_inputs=True))
        tracer = ModelTracer(device_type)
        within.enter_context(tracer.attributing())
        within.enter_context(_backward_told_to(tracer))
        stepped = register_optimizer_step_post_hook(
            lambda optimizer, _args, _kwargs: tracer.optimizer_stepped(optimizer)
        )
        within.callback(stepped.remove)
        within.enter_context(tracer)
        try:
            yield tracer
        finally:
            tracer.stop()


@contextmanager
def _backward_told_to(tracer: ModelTracer) -> Iterator[None]:
    backward, swap = torch.autograd.backward, torch.utils.swap_tensors

    def told(*args: Any, **kwargs: Any) -> None:
        tracer.backward_begins()
        backward(*args, **kwargs)
        tracer.backward_ended()

    torch.autograd.backward = told
    torch.utils.swap_tensors = _swap
    try:
        yield
    finally:
        torch.autograd.backward, torch.utils.swap_tensors = backward, swap


def _swap(old: Any, new: Any) -> None:
    """Give a fake parameter the tensor it was moved to: ``model.cuda()``, ``model.half()``.

    Real parameters are given theirs through ``data``, and stay the same objects. torch would
    swap fake ones instead, which it refuses while anything refers to them weakly.
    """
    with torch.no_grad():
        old.data = new.data
    old.fake_device = new.fake_device
