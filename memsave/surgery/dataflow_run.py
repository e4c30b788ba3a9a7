"""The dataflow of one forward as it runs, on tensors that have shapes and no memory.

A copy of the model runs, so that nothing of the model changes: no statistics, no counters, no
random numbers. What is seen below autograd's level is exact: every read, every write, every view.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from memsave.surgery.dataflow import Call, Dataflow, Value, is_leaf

__all__ = ["guessed_inputs", "run_dataflows"]

_SIDES = (64, 128, 32)  # tried in this order: most networks pool a few times


def run_dataflows(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Dataflow]:
    """Return the dataflow in training and in evaluation.

    Raises what the forward raises; RuntimeError where it asks for the values of a tensor.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        shadow = copy.deepcopy(model)
    device = next((parameter.device for parameter in model.parameters()), None)
    inputs = tree_map_only(Tensor, lambda t: _without_memory(fake, t, device), (args, dict(kwargs)))
    flows = []
    for training in (True, False):
        for module, original in zip(shadow.modules(), model.modules(), strict=True):
            module.training = original.training if original.training != model.training else training
        flows.append(_Recorder(shadow).run(fake, *inputs))
    return flows


def guessed_inputs(model: nn.Module) -> list[tuple[Tensor, ...]]:
    """Return inputs that the model's first convolution could take, of several sides."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            channels, dims = module.in_channels, len(module.kernel_size)
            like = module.weight
            return [
                (torch.empty(2, channels, *(side,) * dims, dtype=like.dtype, device="meta"),)
                for side in _SIDES
            ]
    return []


def _without_memory(fake: FakeTensorMode, tensor: Tensor, device: torch.device | None) -> Tensor:
    """Return a tensor of this shape and type, where the model is."""
    with fake:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device
        )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs a model and writes down its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.flow = Dataflow()
        self._values: dict[int, Value] = {}  # by storage
        self._alive: list[Tensor] = []  # so that no two storages share a key
        self._owners: list[str] = []
        self._layers: list[Call] = []  # the leaf that runs, if one does
        self._known: set[int] = set()  # storages from before that leaf

    def run(self, fake: FakeTensorMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dataflow:
        for tensor in _tensors((args, kwargs)):
            self._value(tensor).is_input = True
        modules = list(self.model.named_modules())
        try:
            for name, module in modules:
                module.__dict__["forward"] = self._watched(name, module, module.forward)
            with torch.no_grad(), fake, self:
                result = self.model(*args, **kwargs)
        finally:
            for _, module in modules:
                module.__dict__.pop("forward", None)
        for tensor in _tensors(result):
            self._value(tensor).is_result = True
        return self.flow

    def _watched(
        self, name: str, module: nn.Module, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def layer(*args: Any, **kwargs: Any) -> Any:
            if self._layers:  # inside another one: a part of it
                return forward(*args, **kwargs)
            call = Call(type(module).__name__, name, self._owners[-1] if self._owners else "")
            arguments = _tensors((args, kwargs))
            call.argument = self._value(arguments[0]) if arguments else None
            self._known = set(self._values)
            self._layers.append(call)
            try:
                result = forward(*args, **kwargs)
            finally:
                self._layers.pop()
            self._finish(call, _tensors(result))
            return result

        def container(*args: Any, **kwargs: Any) -> Any:
            self._owners.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                self._owners.pop()

        return layer if is_leaf(module) else container

    def _finish(self, call: Call, results: list[Tensor]) -> None:
        if not results:
            return
        result = self._value(results[0])
        if result is call.argument:
            # Identity, or dropout with p=0: as if it were not there.
            result.handed_on = True
            for value in self._values.values():
                value.readers = [reader for reader in value.readers if reader is not call]
            return
        call.result = result
        result.producer = call
        self.flow.calls.append(call)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` and note what it read, wrote and made."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for the device: reads no values
            return func(*args, **kwargs)
        call = self._layers[-1] if self._layers else self._function(func, args)
        read = _tensors((args, kwargs))
        for tensor in read:
            value = self._value(tensor)
            if call not in value.readers and value.producer is not call:
                value.readers.append(call)
        result = func(*args, **kwargs)
        written = _written(func, args, kwargs)
        for tensor in written:
            self._write(call, tensor)
        for tensor in _tensors(result):
            if self._key(tensor) not in self._values:
                self._value(tensor).producer = call
        if not self._layers:
            results = _tensors(result)
            call.argument = call.argument or (call.overwrites if written else None)
            call.result = self._value(results[0]) if results else None
            self.flow.calls.append(call)
        return result

    def _function(self, func: Any, args: tuple[Any, ...]) -> Call:
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        call = Call(name, None, self._owners[-1] if self._owners else "")
        tensors = _tensors(args)
        call.argument = self._value(tensors[0]) if tensors else None
        call.parameters = tuple(a for a in args if not isinstance(a, Tensor))
        return call

    def _write(self, call: Call, tensor: Tensor) -> None:
        old = self._value(tensor)
        if old.producer is call:
            return
        if call.overwrites is None:
            call.overwrites = old
        new = Value(producer=call, nbytes=tensor.nbytes, is_input=old.is_input)
        self._values[self._key(tensor)] = new

    def _value(self, tensor: Tensor) -> Value:
        key = self._key(tensor)
        if key not in self._values:
            self._values[key] = Value(nbytes=tensor.nbytes)
            self._alive.append(tensor)
        return self._values[key]

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            written += _tensors(given)
    return written


def _tensors(value: Any) -> list[Tensor]:
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += [t for t in tree_leaves(vars(leaf)) if isinstance(t, Tensor)]
    return found
