"""A case made runnable: model, loss, optimizer and batch, and the step that uses them.

One code for real and for fake tensors: it runs on whatever device it is built
on, so what is predicted is what is measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bench.case import Case
from bench.errors import MembenchError, nearest
from bench.losses import LOSSES, check_loss
from bench.schedules import check_schedule
from memsave import networks
from memsave.errors import MemsaveError
from memsave.mixed_precision import MixedPrecision
from memsave.technique_pairs import check_pairs
from memsave.techniques import Technique, check_precision, find_technique, parse_options

__all__ = ["OPTIMIZERS", "Mark", "Workload", "build_workload", "is_exact", "technique_names"]

Mark = Callable[[str], None]
"""Called with ``"model"``, ``"forward"``, ``"backward"`` or ``"optimizer"`` as each begins."""

# What a suite may name. foreach is given explicitly: under fake tensors torch would choose the
# single-tensor path, which has none of the model-sized temporaries of CUDA's default.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"lr": 4e-4, "foreach": True}),
    "adamw": (torch.optim.AdamW, {"lr": 4e-4, "foreach": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "foreach": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-5, "foreach": True}),
}


@dataclass(slots=True)
class Workload:
    """What a case runs. ``step`` is one training step, or one prediction of a volume."""

    model: nn.Module
    images: Tensor  # (batch, channels, *sides), sides in the order in which the network takes them
    target: Tensor | None  # class indices (batch, *sides) or a mask; None in mode "infer"
    loss: Callable[[Tensor, Tensor], Tensor] | None
    optimizer: torch.optim.Optimizer | None
    precision: MixedPrecision
    techniques: list[tuple[Technique, Any]] = field(default_factory=list)
    schedule: LRScheduler | None = None  # told after every step: a step counts as an epoch
    notes: tuple[str, ...] = ()  # how it was made, for the record's environment
    loss_inside: str = ""  # the loss that the model computes itself, by name, as tiled levels do

    def step(self, mark: Mark) -> None:
        """Run one step, telling ``mark`` when each phase begins."""
        with ExitStack() as around:
            for technique, options in sorted(self.techniques, key=lambda t: t[0].step_order):
                around.enter_context(technique.step(self.model, options))
            if self.optimizer is None:
                self._infer(mark)
            else:
                self._train(mark, self.optimizer)

    def _infer(self, mark: Mark) -> None:
        mark("forward")
        with torch.no_grad(), self.precision.forward():
            self.output()

    def batch(self) -> tuple[Tensor, ...]:
        """Return what a step is given: the images, and the target if there is one."""
        return (self.images,) if self.target is None else (self.images, self.target)

    def output(self) -> Any:
        """Run the network on the batch; give the loss itself where the network computes it."""
        if self.loss_inside:
            model: Any = self.model
            return model.training_loss(self.images, self.target, self.loss_inside)
        return self.model(self.images)

    def loss_of(self, output: Any) -> Tensor:
        """Return the loss of the network's output."""
        assert self.loss is not None
        assert self.target is not None
        return self.loss(output, self.target)

    def _train(self, mark: Mark, optimizer: torch.optim.Optimizer) -> None:
        mark("forward")
        with self.precision.forward():
            loss = self.loss_of(self.output())
        mark("backward")
        self.precision.backward(loss)
        mark("optimizer")
        self.precision.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            with warnings.catch_warnings():
                # torch warns where fp16 skipped the very first update, as it may.
                warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler")
                self.schedule.step()

    def parameter_count(self) -> int:
        """Return the number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def build_workload(case: Case, mark: Mark, device: str | torch.device) -> Workload:
    """Build the model, the optimizer and a random batch on ``device``, such as "cuda:0".

    Modules are made there rather than moved. The steps then run outside of any device scope, as
    a training script's do: an optimizer keeps its step counters on the CPU.
    Raises MembenchError where the case names what does not exist or cannot be combined.
    """
    mark("model")
    try:
        with torch.device(device):
            return _build(case)
    except MemsaveError as error:
        raise MembenchError(str(error)) from error


def _build(case: Case) -> Workload:
    torch.manual_seed(case.seed)
    if case.imported is not None:
        from bench.imported_workload import build_imported

        return build_imported(case)
    device = torch.get_default_device()
    techniques = [_technique(use.name, use.options, case.precision) for use in case.techniques]
    check_pairs(techniques)
    model = _build_model(case, techniques)
    training = case.mode == "train"
    model.train(training)
    optimizer = _build_optimizer(case, model, techniques) if training else None
    spec = networks.find_network(case.network)
    size = (case.network_options, case.batch_size, case.shape)
    images = torch.randn(spec.image_shape(*size))
    target = _random_target(spec, *size) if training else None
    if training:
        check_loss(case.loss, spec.target)
    inside = training and case.loss in getattr(model, "training_losses", ())
    return Workload(
        model=model,
        images=images,
        target=target,
        loss=_loss(case.loss, inside) if training else None,
        loss_inside=case.loss if inside else "",
        optimizer=optimizer,
        precision=MixedPrecision(case.precision, device_type=device.type),
        techniques=techniques,
        schedule=None if optimizer is None else _build_schedule(case, optimizer),
    )


def _loss(name: str, inside: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return (lambda loss, _target: loss) if inside else LOSSES[name]


def _random_target(
    spec: networks.NetworkSpec, options: dict[str, Any], batch_size: int, shape: tuple[int, ...]
) -> Tensor:
    sides = spec.target_shape(options, batch_size, shape)
    if spec.target == "mask":
        return torch.randint(2, sides, dtype=torch.float32)
    return torch.randint(spec.output_channels(options), sides)


def _technique(name: str, options: dict[str, Any], precision: str) -> tuple[Technique, Any]:
    technique = find_technique(name)
    check_precision(technique, precision)
    return technique, parse_options(technique, options)


def _build_model(case: Case, techniques: list[tuple[Technique, Any]]) -> nn.Module:
    network_options = dict(case.network_options)
    for technique, options in techniques:
        network_options = dict(technique.build(network_options, options))
    model = networks.build(case.network, network_options)
    for technique, options in techniques:
        model = technique.module(model, options)
    return model


def _build_optimizer(
    case: Case, model: nn.Module, techniques: list[tuple[Technique, Any]]
) -> torch.optim.Optimizer:
    kind: type[torch.optim.Optimizer]
    kind, defaults = _find(OPTIMIZERS, case.optimizer, "optimizer")
    options = {**defaults, **case.optimizer_options}
    if options.get("fused"):  # torch refuses both at once
        options.pop("foreach", None)
    optimizer: torch.optim.Optimizer = kind(
        (p for p in model.parameters() if p.requires_grad), **options
    )
    for technique, technique_options in techniques:
        optimizer = technique.optimizer(optimizer, model, technique_options)
    return optimizer


def _build_schedule(case: Case, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
    if case.schedule is None:
        return None
    schedule = check_schedule(case.schedule, case.schedule_options)
    if schedule.needs_loss:
        raise MembenchError(
            f"schedule {schedule.name!r} follows the loss, which a step does not read back from "
            "the GPU: use poly, or give it to training"
        )
    return schedule(optimizer, **case.schedule_options)


def technique_names(case: Case) -> tuple[str, ...]:
    """Return the techniques in use: those named, and options that name one (as a norm may)."""
    from memsave.techniques import TECHNIQUES

    named = [use.name for use in case.techniques]
    options = [str(v) for v in case.network_options.values() if isinstance(v, str)]
    return tuple(dict.fromkeys([*(o for o in options if o in TECHNIQUES), *named]))


def is_exact(case: Case) -> bool:
    """Whether all techniques in use give the plain network's gradients at the same precision."""
    return all(find_technique(name).exact for name in technique_names(case))


def _find(table: dict[str, Any], name: str, kind: str) -> Any:
    if name not in table:
        raise MembenchError(f"unknown {kind} {name!r}{nearest(name, table)}")
    return table[name]
