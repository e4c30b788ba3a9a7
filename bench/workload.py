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

from memsave.mixed_precision import MixedPrecision
from memsave.techniques import Technique

__all__ = ["OPTIMIZERS", "Mark", "Workload"]

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
