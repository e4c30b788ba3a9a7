"""The learning-rate schedules that the papers train with, by name: torch's own, with their options.

A schedule is told once an epoch; what an epoch is, its user says. One that is told the epoch's
loss has ``needs_loss``: a suite cannot name it, since a benchmark's step never reads its loss back
from the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, PolynomialLR, ReduceLROnPlateau

from bench.errors import MembenchError, nearest

__all__ = ["SCHEDULES", "Schedule", "check_schedule", "find_schedule", "make_schedule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule as a suite or a recipe names it. ``options``: their names and usual values."""

    name: str
    make: Callable[..., LRScheduler]  # (optimizer, **options)
    options: dict[str, int | float]
    needs_loss: bool
    summary: str
    source: str

    def __call__(self, optimizer: Optimizer, /, **options: int | float) -> LRScheduler:
        """Return the schedule of ``optimizer``, with ``options`` instead of the usual values."""
        return self.make(optimizer, **{**self.options, **options})


def _poly(optimizer: Optimizer, *, epochs: int, power: float) -> LRScheduler:
    return PolynomialLR(optimizer, total_iters=epochs, power=power)


def _plateau(optimizer: Optimizer, *, factor: float, patience: int) -> LRScheduler:
    return ReduceLROnPlateau(optimizer, factor=factor, patience=patience)


SCHEDULES: dict[str, Schedule] = {
    "poly": Schedule(
        name="poly",
        make=_poly,
        options={"epochs": 600, "power": 0.9},
        needs_loss=False,
        summary="the rate times (1 - epoch / epochs) ** power; 0 from the last epoch on",
        source="He, Luo: Fast and Low GPU Memory Abdominal organ segmentation, FLARE 2021",
    ),
    "plateau": Schedule(
        name="plateau",
        make=_plateau,
        options={"factor": 0.3, "patience": 50},
        needs_loss=True,
        summary="the rate times factor once the loss has not fallen for more than patience epochs",
        source="Wang, Oda, Mori: Organ Segmentation From Full-size CT Images Using "
        "Memory-Efficient FCN",
    ),
    "halve_on_plateau": Schedule(
        name="halve_on_plateau",
        make=_plateau,
        options={"factor": 0.5, "patience": 10},
        needs_loss=True,
        summary="half the rate once the loss has not fallen for more than patience epochs",
        source="Celaya et al.: PocketNet, arXiv:2104.10745",
    ),
}


def find_schedule(name: str) -> Schedule:
    """Return the schedule called ``name``, or raise MembenchError with near names."""
    if name not in SCHEDULES:
        raise MembenchError(f"unknown schedule {name!r}{nearest(name, SCHEDULES)}")
    return SCHEDULES[name]


def check_schedule(name: str, options: Mapping[str, Any]) -> Schedule:
    """Return the schedule ``name``; raise MembenchError unless it can take ``options``.

    ``epochs`` is 1 or more, ``patience`` 0 or more, both whole; ``factor`` lies between 0 and 1,
    ``power`` is more than 0.
    """
    schedule = find_schedule(name)
    for key, value in options.items():
        if key not in schedule.options:
            raise MembenchError(
                f"schedule {name} has no option {key!r}{nearest(key, schedule.options)}"
            )
        if not _fits(key, value):
            raise MembenchError(
                f"schedule {name}: {key} {value!r} will not do, it is {_RANGES[key]}"
            )
    return schedule


_RANGES = {
    "epochs": "a whole number, 1 or more",
    "patience": "a whole number, 0 or more",
    "factor": "a number between 0 and 1",
    "power": "a number above 0",
}


def _fits(key: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if key in ("epochs", "patience"):
        return isinstance(value, int) and value >= (1 if key == "epochs" else 0)
    return 0 < value < (1 if key == "factor" else float("inf"))


def make_schedule(
    optimizer: Optimizer, name: str, options: Mapping[str, Any] | None = None
) -> LRScheduler:
    """Return the schedule ``name`` of ``optimizer``; errors as ``check_schedule``."""
    return check_schedule(name, options or {})(optimizer, **(options or {}))
