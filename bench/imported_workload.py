"""The workload of a network of the user's own: its inputs, its loss and its optimizer.

What a case leaves open is filled in so: one image of (batch, channels, *sides) in float32; the
loss ``"sum"``, the sum of all that the network returns; a target of class indices, one for each
voxel where the output has the input's number of dimensions, one for each sample where it has two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Case
from bench.errors import MembenchError, nearest
from bench.imported import InputSpec, is_reference, parse_input, resolve
from bench.imported_calls import (
    check_inputs,
    check_loss_call,
    check_step,
    check_types,
    takes_target,
)
from bench.imported_model import build_model, make_tensor
from bench.losses import LOSS_TARGETS, LOSSES
from bench.portable import unpack
from bench.workload import OPTIMIZERS, Mark, Workload
from memsave.apply import Applied
from memsave.mixed_precision import MixedPrecision

__all__ = ["SUM_LOSS", "ImportedWorkload", "build_imported", "case_inputs", "output_sum"]

SUM_LOSS = "sum"


def output_sum(output: Any) -> Tensor:
    """Return the sum of every floating-point tensor in ``output``, in float32 or wider; a scalar.

    Tuples, lists and mappings are looked into, and objects' fields, as of named outputs.
    """
    sums = [
        t.sum(dtype=torch.promote_types(t.dtype, torch.float32))
        for t in _tensors(output)
        if t.is_floating_point() and t.requires_grad
    ]
    if not sums:
        raise MembenchError(
            f"the network gives {_described(output)}, in which no tensor has a gradient: use mode "
            "infer, or a loss of your own"
        )
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total


@dataclass(slots=True)
class ImportedWorkload(Workload):
    """A workload whose network may take several inputs, and whose loss may look at anything."""

    more_inputs: tuple[Tensor, ...] = ()
    applied: Applied | None = None
    target_kind: str = ""  # "classes", "mask", "given" or "" where the loss takes no target
    classes: int | None = None
    loss_name: str = ""

    def step(self, mark: Mark) -> None:
        """Run one step within what the techniques that were applied put around it."""
        with ExitStack() as around:
            if self.applied is not None:
                around.enter_context(self.applied.step())
            Workload.step(self, mark)

    def batch(self) -> tuple[Tensor, ...]:
        """Return what a step is given: every input, and the target if there is one."""
        target = () if self.target is None else (self.target,)
        return (self.images, *self.more_inputs, *target)

    def output(self) -> Any:
        """Run the network on the batch."""
        inputs = (self.images, *self.more_inputs)
        try:
            return self.model(*inputs)
        except RuntimeError as error:
            check_types(self.model, inputs, str(error))
            raise

    def loss_of(self, output: Any) -> Tensor:
        """Return the loss of the network's output; a MembenchError where the two do not fit."""
        call: Any = self.loss
        if self.target_kind in ("classes", "mask"):
            self._fit_target(output)
        loss = call(output, self.target) if self.target_kind else call(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MembenchError(
                f"loss {self.loss_name!r} gives {_described(loss)}, not one number: reduce it, as "
                "by .mean()"
            )
        return loss

    def _fit_target(self, output: Any) -> None:
        """Check the output against the target that was supposed, or make the one that it needs."""
        name, images = self.loss_name, tuple(self.images.shape)
        if not isinstance(output, Tensor):
            if name in LOSSES:
                raise MembenchError(
                    f"the network gives {_described(output)}, loss {name!r} takes one tensor: give "
                    "a loss of your own, as mypackage.losses:loss"
                )
            return
        shape = tuple(output.shape)
        if self.classes is not None and (len(shape) < 2 or shape[1] != self.classes):
            raise MembenchError(
                f"the network gives {_sides(shape)}, and not {self.classes} classes along its "
                "second dimension: say how many there are, or mend its arguments"
            )
        if name not in LOSSES:
            return
        if len(shape) == 2 and len(images) != 2 and self.target_kind == "classes":
            if self.target is None or self.target.dim() != 1:
                self.target = torch.randint(shape[1], shape[:1], device=output.device)
        elif (shape[:1], shape[2:]) != (images[:1], images[2:]):
            raise MembenchError(
                f"the network gives {_sides(shape)} for an input of {_sides(images)}: loss "
                f"{name!r} compares them voxel by voxel, so give a loss of your own, or 'sum'"
            )
        elif self.target_kind == "mask" and self.target is not None and self.target.shape != shape:
            self.target = torch.randint(2, shape, dtype=torch.float32, device=output.device)


def case_inputs(case: Case) -> tuple[InputSpec, ...]:
    """Return the shapes and types of what the case's network is called with."""
    assert case.imported is not None
    if case.imported.inputs:
        return tuple(parse_input(text) for text in case.imported.inputs)
    return (InputSpec((case.batch_size, case.imported.in_channels, *case.shape)),)


def build_imported(case: Case) -> ImportedWorkload:
    """Build the case's network, optimizer and random batch on the default device.

    Errors: MembenchError and MemsaveError for what the case names and does not fit; what the
    user's own code raises is raised.
    """
    assert case.imported is not None
    device = torch.get_default_device()
    inputs = case_inputs(case)
    model, applied, notes = build_model(case, inputs)
    training = case.mode == "train"
    check_inputs(case.network, model, len(inputs))
    model.train(training)
    optimizer = _optimizer(case, model) if training else None
    if optimizer is not None and applied is not None:
        optimizer = applied.optimizer(optimizer)
    images, *more = (_random(spec) for spec in inputs)
    loss, kind = _loss(case) if training else (None, "")
    return ImportedWorkload(
        model=model,
        images=images,
        target=_target(case, kind, inputs[0]),
        loss=loss,
        optimizer=optimizer,
        precision=MixedPrecision(case.precision, device_type=device.type),
        notes=notes,
        more_inputs=tuple(more),
        applied=applied,
        target_kind=kind,
        classes=case.imported.classes,
        loss_name=case.loss,
    )


def _random(spec: InputSpec) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(spec.shape, dtype=dtype)
    return torch.randint(2, spec.shape, dtype=dtype)


def _loss(case: Case) -> tuple[Callable[..., Any], str]:
    """Return the loss, and what kind of target it is given: "" for none."""
    assert case.imported is not None
    if sent := case.imported.pickled.get("loss"):
        loss = unpack(sent, make_tensor)
    elif case.loss == SUM_LOSS:
        return output_sum, ""
    elif is_reference(case.loss):
        loss = resolve(case.loss, "loss")
        if isinstance(loss, type) and issubclass(loss, nn.Module):
            check_loss_call(case.loss, loss, 0)
            loss = loss()
    elif case.loss in LOSSES:
        kind = "given" if case.imported.target else LOSS_TARGETS[case.loss][0]
        return LOSSES[case.loss], kind
    else:
        known = [*LOSSES, SUM_LOSS]
        raise MembenchError(
            f"unknown loss {case.loss!r}{nearest(case.loss, known)}; a loss of your own is named "
            "as mypackage.losses:loss"
        )
    if not callable(loss):
        raise MembenchError(f"loss {case.loss!r} is a {type(loss).__name__}: name a function")
    targeted = bool(case.imported.target) or takes_target(loss)
    check_loss_call(case.loss, loss, 2 if targeted else 1)
    if case.imported.target:
        return loss, "given"
    return loss, "classes" if targeted else ""


def _target(case: Case, kind: str, image: InputSpec) -> Tensor | None:
    """Make the target that the case names, or the one that a dense output would be given."""
    assert case.imported is not None
    if not kind:
        return None
    if case.imported.target:
        return _random(parse_input(case.imported.target))
    classes = case.imported.classes
    batch, sides = image.shape[:1], image.shape[2:]
    if kind == "mask":
        return torch.randint(2, (*batch, classes or 1, *sides), dtype=torch.float32)
    return torch.randint(classes or 2, (*batch, *sides))


def _optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    assert case.imported is not None
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise MembenchError(
            f"network {case.network} has no parameter that is trained: use mode infer"
        )
    sent = case.imported.pickled.get("optimizer")
    if sent is None and case.optimizer in OPTIMIZERS:
        kind, defaults = OPTIMIZERS[case.optimizer]
        options = {**defaults, **case.optimizer_options}
        if options.get("fused"):  # torch refuses both at once
            options.pop("foreach", None)
        return kind(parameters, **options)
    if sent is None and not is_reference(case.optimizer):
        raise MembenchError(
            f"unknown optimizer {case.optimizer!r}{nearest(case.optimizer, OPTIMIZERS)}; one of "
            "your own is named as mypackage.optimizers:make"
        )
    make = unpack(sent, make_tensor) if sent else resolve(case.optimizer, "optimizer")
    optimizer = make(parameters, **case.optimizer_options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MembenchError(
            f"optimizer {case.optimizer!r} gave a {type(optimizer).__name__}: return a "
            "torch.optim.Optimizer made for the parameters that it is called with"
        )
    check_step(case.optimizer, optimizer)
    _as_on_cuda(optimizer)
    return optimizer


def _as_on_cuda(optimizer: torch.optim.Optimizer) -> None:
    """Choose foreach where torch would, left to itself, on CUDA; under fake tensors it would not.

    The difference is temporaries of the size of the model.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = not group.get("differentiable")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
    elif is_dataclass(value):  # with slots
        yield from _tensors([getattr(value, part.name, None) for part in fields(value)])


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {_sides(tuple(value.shape)) or 'one number'}"
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
