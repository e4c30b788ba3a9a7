"""A user's network, made on a device: by its factory, or as the object that was given.

Under fake tensors it is made without the tracer first, then its parameters and buffers are made
anew where the tracer sees them: so a constructor that reads values, which fake tensors do not
have, can run for real on the CPU in between, and techniques can look at the module as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes

import memsave
from bench.case import Case
from bench.errors import MembenchError
from bench.imported import Imported, InputSpec, resolve
from bench.imported_device import Instead, converting_fakes
from bench.portable import unpack
from memsave.apply import Applied

__all__ = ["BUILT_ON_CPU", "build_model", "make_tensor"]

BUILT_ON_CPU = (
    "the network's constructor reads values, so it was built for real on the CPU and its weights "
    "made fake"
)
# What a constructor raises when it reads a value that a fake or a meta tensor does not have. If it
# has another reason, the second try, with values, gives it again.
_NO_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    RuntimeError,
    TypeError,
    ValueError,
    AssertionError,
)


def build_model(
    case: Case, inputs: tuple[InputSpec, ...]
) -> tuple[nn.Module, Applied | None, tuple[str, ...]]:
    """Return the case's network on the default device, what techniques did to it, and notes.

    Errors: MembenchError where the factory cannot be imported or gives no module; what it raises
    is raised.
    """
    assert case.imported is not None
    imported, device = case.imported, torch.get_default_device()

    def make() -> nn.Module:
        return _module(imported)

    _import_as_elsewhere(imported)
    fake_mode = _active_fake_mode()
    if fake_mode is None:
        model = _moved(make(), device)
        return model, _apply(case, model, inputs), ()
    with _disable_current_modes():
        model, notes = _without_weights(make, fake_mode, device, meta=bool(case.techniques))
        applied = _apply(case, model, inputs)
    if applied is None and not notes:
        return _as_constructed(model, make, device), None, ()
    if applied is not None:
        model = applied.model
    _place(model, device)
    return model, applied, notes


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    """Move what a constructor made elsewhere, as a training script does with the whole network."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return model.to_empty(device=device)
    if any(tensor.device.type != device.type for tensor in tensors):
        model.to(device)
    return model


def _import_as_elsewhere(imported: Imported) -> None:
    """Import the network's module so that its own tensors are real and on the CPU, as anywhere.

    They outlive the case, and the next one could not use what is fake.
    """
    if "build" not in imported.pickled:
        with _disable_current_modes(), torch.device("cpu"):
            resolve(imported.reference)


def _active_fake_mode() -> FakeTensorMode | None:
    """Return the mode under which tensors made now would be fake, None if they would be real."""
    probe = torch.empty(0)
    return probe.fake_mode if isinstance(probe, FakeTensor) else None


def make_tensor(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Make a tensor of what was sent here, on the default device and without its values."""
    return torch.empty_strided(shape, stride, dtype=dtype)


def _module(imported: Imported) -> nn.Module:
    sent = imported.pickled.get("build")
    build = resolve(imported.reference) if sent is None else unpack(sent, make_tensor)
    if isinstance(build, nn.Module):
        return build
    if not callable(build):
        raise MembenchError(
            f"network {imported.reference!r} is a {type(build).__name__}: name a function or class "
            "that returns a torch.nn.Module"
        )
    model = build(**imported.arguments)
    if not isinstance(model, nn.Module):
        raise MembenchError(
            f"network {imported.reference!r} gave a {type(model).__name__}, not a torch.nn.Module: "
            "return the network from it"
        )
    return model


def _without_weights(
    make: Callable[[], nn.Module], fake_mode: FakeTensorMode, device: torch.device, *, meta: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build without allocating weights if that can be; else on the CPU, and say so."""
    where = torch.device("meta") if meta else device
    try:
        with nullcontext() if meta else fake_mode, converting_fakes(), Instead(where), where:
            return make(), ()
    except _NO_VALUES:
        with Instead(torch.device("cpu")), torch.device("cpu"):
            model = make()
        return (model.to("meta") if meta else model), (BUILT_ON_CPU,)


def _as_constructed(
    unseen: nn.Module, make: Callable[[], nn.Module], device: torch.device
) -> nn.Module:
    """Make the network again where the tracer sees the constructor, with the tables it works out.

    ``unseen``: the same network, from a constructor that is known to go through.
    """
    for module in unseen.modules():
        for name, tensor in list(_own_tensors(module)):
            _check_made(module, name, tensor)
    with converting_fakes(), Instead(device):
        model = make()
    kept = {id(t) for t in unseen.state_dict(keep_vars=True).values()} & {
        id(t) for t in model.state_dict(keep_vars=True).values()
    }
    _place(model, device, elsewhere=not kept)  # of one that is kept no constructor ran
    return model


def _apply(case: Case, model: nn.Module, inputs: tuple[InputSpec, ...]) -> Applied | None:
    if not case.techniques:
        return None
    examples = tuple(
        torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in inputs
    )
    entries = [(use.name, use.options) for use in case.techniques]
    return memsave.apply(model, entries, example_inputs=examples)


def _place(model: nn.Module, device: torch.device, *, elsewhere: bool = False) -> None:
    """Make every tensor of ``model`` anew on ``device``; one that stands twice is made once.

    ``elsewhere``: only those that are on another device.
    """
    made: dict[int, Tensor] = {}

    def anew(tensor: Tensor) -> Tensor:
        if elsewhere and tensor.device == device:
            return tensor
        if id(tensor) not in made:
            fresh = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
            if isinstance(tensor, nn.Parameter):
                fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fresh
        return made[id(tensor)]

    old: list[Any] = []  # kept to the end, so that no two tensors share an id
    for module in model.modules():
        for name, tensor in list(_own_tensors(module)):
            old.append(tensor)
            _check_made(module, name, tensor)
            if (new := anew(tensor)) is not tensor:
                setattr(module, name, new)
        for name, value in list(vars(module).items()):
            if isinstance(value, list | tuple | dict) and not name.startswith("_"):
                old += _tensors_inside(value)
                setattr(module, name, _anew_inside(value, anew))
    for module in model.modules():
        if made and isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # as its constructor did, where cuDNN is to run it


def _check_made(module: nn.Module, name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise MembenchError(
            f"{type(module).__name__} has no {name} before its first input: give a factory "
            "that names the number of input channels, as with Linear for LazyLinear"
        )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's parameters and buffers in their order, then its plain attributes."""
    for table in (module._parameters, module._buffers, vars(module)):
        for name, value in table.items():
            if isinstance(value, Tensor):
                yield name, value


def _tensors_inside(value: Any, levels: int = 8) -> list[Tensor]:
    """Return the tensors in a container and in the containers in it, which may hold itself."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, list | tuple | dict) or not levels:
        return []
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in _tensors_inside(part, levels - 1)]


def _anew_inside(value: Any, anew: Callable[[Tensor], Tensor], levels: int = 8) -> Any:
    """Make the tensors of a container anew, within it: another module may hold it as well."""
    if isinstance(value, Tensor):
        return anew(value)
    if not _tensors_inside(value, levels):
        return value
    if isinstance(value, tuple):
        parts = [_anew_inside(part, anew, levels - 1) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        value[key] = _anew_inside(part, anew, levels - 1)
    return value
