"""The training loop of recipes and of parity: a workload's own step, batch after batch.

What is benchmarked is what trains: each step is ``Workload.step``, with its techniques, precision
and optimizer. This module adds what training needs beside it: batches, learning-rate schedules,
readings of loss and score, and an end at the first number that is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bench.build_workload import build_workload
from bench.case import Case
from bench.errors import MembenchError
from bench.workload import Workload

__all__ = [
    "Batch",
    "DivergedError",
    "Evaluate",
    "MakeSchedule",
    "Reading",
    "train",
    "train_case",
]

Batch = tuple[Tensor, Tensor]
"""Images (N, channels, *sides) and targets: int64 classes (N, *sides), or a float mask."""

Evaluate = Callable[[nn.Module], Sequence[float]]
"""Scores of a model, such as Dice by class; called in eval mode, without gradients."""


class MakeSchedule(Protocol):
    """What makes a schedule for an optimizer: a class of ``torch.optim.lr_scheduler``, say."""

    def __call__(self, optimizer: torch.optim.Optimizer, /) -> LRScheduler:
        """Return the schedule."""
        ...


class DivergedError(MembenchError):
    """Training came to a loss or a weight that is no finite number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One step of training, counted from 1."""

    step: int
    loss: float  # of the step's batch, before the step's update
    learning_rate: float  # of the step's update, of the first parameter group
    scores: tuple[float, ...] | None = None  # after the update; None where nothing was evaluated
    skipped: bool = False  # fp16: gradients overflowed, the weights stayed as they were


def train_case(
    case: Case,
    batches: Iterable[Batch],
    *,
    steps: int,
    device: str | torch.device = "cpu",
    schedule: MakeSchedule | None = None,
    steps_per_epoch: int = 1,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 10,
) -> list[Reading]:
    """Build the model of ``case`` from its seed, train it, return the readings: see ``train``."""
    workload = build_workload(case, lambda _phase: None, device)
    made = None
    if schedule is not None:
        assert workload.optimizer is not None, f"case {case.name} does not train"
        made = schedule(workload.optimizer)
    readings = train(
        workload,
        batches,
        steps=steps,
        seed=case.seed,
        schedule=made,
        steps_per_epoch=steps_per_epoch,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
    )
    return list(readings)


def train(
    workload: Workload,
    batches: Iterable[Batch],
    *,
    steps: int,
    seed: int | None = None,
    schedule: LRScheduler | None = None,
    steps_per_epoch: int = 1,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 10,
) -> Iterator[Reading]:
    """Train ``workload.model`` for ``steps`` batches, yielding a reading after each.

    The batches go to the device on which the workload was built. The workload's own batch is not
    used, and stands there again afterwards. Whoever iterates may stop, or change what is trained
    between two steps.

    Args:
        workload: built in mode "train".
        batches: at least ``steps`` of them.
        steps: how many batches to train with.
        seed: of torch's global generator, which dropout draws from; None leaves it as it is.
        schedule: told after each epoch: ``step(mean loss of the epoch)`` for ReduceLROnPlateau,
            else ``step()``, though not before the first update, which fp16 may skip. None: the
            workload's own, if it has one.
        steps_per_epoch: what an epoch is to the schedule; a last, shorter one does not count.
        evaluate: scores the model after every ``evaluate_every`` steps and after the last one.
        evaluate_every: steps from one evaluation to the next.

    Raises MembenchError for numbers below 1, a workload that does not train or too few batches;
    DivergedError at a loss that is not finite, or at weights that are not, after the last step.
    """
    loop = _Loop(
        optimizer=_optimizer(workload),
        steps=_positive("steps", steps),
        schedule=workload.schedule if schedule is None else schedule,
        steps_per_epoch=_positive("steps_per_epoch", steps_per_epoch),
        evaluate=evaluate,
        evaluate_every=_positive("evaluate_every", evaluate_every),
    )
    if seed is not None:
        torch.manual_seed(seed)
    return loop.run(workload, iter(batches))


@dataclass(slots=True, kw_only=True)
class _Loop:
    """What ``train`` was asked for, and where the epoch stands."""

    optimizer: torch.optim.Optimizer
    steps: int
    schedule: LRScheduler | None
    steps_per_epoch: int
    evaluate: Evaluate | None
    evaluate_every: int
    epoch_losses: list[float] = field(default_factory=list)
    updated: bool = False  # torch warns of a schedule that is told before any update

    def run(self, workload: Workload, batches: Iterator[Batch]) -> Iterator[Reading]:
        with _set_aside(workload):
            for step in range(1, self.steps + 1):
                learning_rate = float(self.optimizer.param_groups[0]["lr"])
                loss, skipped = _step(workload, _next(batches, step, self.steps))
                _check_loss(loss, step, learning_rate)
                self.updated = self.updated or not skipped
                self._count(loss)
                if step == self.steps:
                    _check_weights(workload.model, step)
                yield Reading(
                    step=step,
                    loss=loss,
                    learning_rate=learning_rate,
                    scores=self._scores(workload, step),
                    skipped=skipped,
                )

    def _count(self, loss: float) -> None:
        """Tell the schedule if this step was the last of an epoch."""
        self.epoch_losses.append(loss)
        if len(self.epoch_losses) < self.steps_per_epoch:
            return
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(math.fsum(self.epoch_losses) / self.steps_per_epoch)
        elif self.schedule is not None and self.updated:
            self.schedule.step()
        self.epoch_losses.clear()

    def _scores(self, workload: Workload, step: int) -> tuple[float, ...] | None:
        if self.evaluate is None or (step % self.evaluate_every and step < self.steps):
            return None
        return _evaluated(workload, self.evaluate)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise MembenchError(f"{name} must be 1 or more, got {value}")
    return value


def _optimizer(workload: Workload) -> torch.optim.Optimizer:
    if workload.optimizer is None:
        raise MembenchError('this case predicts, it does not train: give it mode "train"')
    return workload.optimizer


@contextmanager
def _set_aside(workload: Workload) -> Iterator[None]:
    """Keep the workload's own batch and schedule, which would count every step as an epoch."""
    images, target, schedule = workload.images, workload.target, workload.schedule
    workload.schedule = None
    try:
        yield
    finally:
        workload.images, workload.target, workload.schedule = images, target, schedule


def _step(workload: Workload, batch: Batch) -> tuple[float, bool]:
    """Run the workload's step on a batch; return its loss and whether its update was skipped."""
    measure = workload.loss
    assert measure is not None
    device = workload.images.device
    workload.images, workload.target = (part.to(device, non_blocking=True) for part in batch)
    seen: list[Tensor] = []

    def recorded(output: Tensor, target: Tensor) -> Tensor:
        loss = measure(output, target)
        seen.append(loss.detach())
        return loss

    scaler = workload.precision.scaler
    before = None if scaler is None else scaler.get_scale()
    workload.loss = recorded
    try:
        workload.step(lambda _phase: None)
    finally:
        workload.loss = measure
    skipped = scaler is not None and before is not None and scaler.get_scale() < before
    return float(seen[-1]), skipped


def _next(batches: Iterator[Batch], step: int, steps: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise MembenchError(
            f"{steps} steps were asked for, but there are {step - 1} batches: give more of them, "
            "such as an endless iterator"
        ) from None


def _evaluated(workload: Workload, evaluate: Evaluate) -> tuple[float, ...]:
    model = workload.model
    training = {module: module.training for module in model.modules()}  # parts may be frozen
    model.eval()
    try:
        with torch.no_grad(), workload.precision.forward():
            return tuple(float(score) for score in evaluate(model))
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _check_loss(loss: float, step: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss of step {step} is {loss} at learning rate {learning_rate:g}: lower the "
            "learning rate, or look for voxels that are no finite numbers in the data"
        )


def _check_weights(model: nn.Module, step: int) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise DivergedError(
                f"after step {step} {name} is not finite, though the loss was: lower the learning "
                "rate"
            )
