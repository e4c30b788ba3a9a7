"""A case of a network that membench knows by name: its techniques, optimizer and random batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bench.case import Case
from bench.errors import MembenchError, nearest
from bench.losses import LOSSES, check_loss
from bench.schedules import check_schedule
from bench.workload import OPTIMIZERS, Workload
from memsave import networks
from memsave.mixed_precision import MixedPrecision
from memsave.technique_pairs import check_pairs
from memsave.techniques import (
    TECHNIQUES,
    Technique,
    check_precision,
    find_technique,
    parse_options,
)

__all__ = ["build_named", "is_exact", "technique_names"]


def build_named(case: Case) -> Workload:
    """Build a network of membench's own with the case's techniques, on the default device.

    Raises MembenchError or MemsaveError where the case names what does not exist or cannot be
    combined.
    """
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
