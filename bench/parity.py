"""Does a technique train as the plain network does? Runs, their curves, and bands around them.

Every run starts from one seed and sees the same crops of one labelled volume, on one device, so a
technique that is exact repeats the plain run to the bit, and another stays near it. Dice is taken
over the whole volume that is trained on: this compares ways of training, it says nothing of how
well a network does on a head that it has not seen.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.build_workload import build_workload
from bench.case import Case
from bench.errors import MembenchError
from bench.metrics import require_metrics
from bench.schedules import make_schedule
from bench.suite.parity import Pair, ParityPlan
from bench.suite.parity_schema import Parity
from bench.training import DivergedError, Reading, train
from bench.training_data import LabelledVolume, in_order, random_crops, whole
from memsave.networks import NetworkSpec, find_network

__all__ = [
    "CUDA_ROUNDING",
    "Comparison",
    "Run",
    "Training",
    "check_fit",
    "compare",
    "comparison_line",
    "run_line",
    "run_parity",
    "train_run",
]

CUDA_ROUNDING = 1e-5
"""What an exact run's loss may differ by on a GPU, where cross-entropy sums in no fixed order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What all runs have in common."""

    volume: LabelledVolume
    settings: Parity
    steps: int
    seed: int
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The curve of one case; ``reason`` says why it ended early, empty if it did not."""

    case: Case  # with the seed and the precision that it was trained with
    readings: tuple[Reading, ...]
    time_s: float
    status: Literal["ok", "diverged"]
    reason: str = ""

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [reading.loss for reading in self.readings]

    @property
    def dice(self) -> list[tuple[int, tuple[float, ...]]]:
        """Steps at which Dice was taken, and Dice of each class but the background."""
        return [(r.step, r.scores) for r in self.readings if r.scores is not None]

    def epoch_losses(self, steps_per_epoch: int) -> list[float]:
        """Return the mean loss of each epoch; of a last, shorter one too."""
        losses = self.losses
        starts = range(0, len(losses), steps_per_epoch)
        epochs = (losses[start : start + steps_per_epoch] for start in starts)
        return [math.fsum(epoch) / len(epoch) for epoch in epochs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A technique's run beside the plain one's."""

    plain: str  # names of cases
    technique: str
    exact: bool  # whether each step's loss had to be equal
    band: float  # what the difference may be: of each step's loss if exact, else of each epoch's
    difference: float  # the largest of that kind; infinite where a run did not come to its end
    step: int  # where it is: the step, or the last step of the epoch
    step_difference: float  # the largest of any step's loss

    @property
    def inside(self) -> bool:
        """Whether the technique stayed within its band."""
        return self.difference <= self.band


def run_parity(
    plan: ParityPlan, training: Training, starting: Callable[[Case], None] = lambda _case: None
) -> Iterator[Run | Comparison]:
    """Train every case of ``plan``; yield each run, and each comparison once both its runs are."""
    check_fit(plan.cases, training.volume)
    require_metrics()  # said before anything is trained
    runs: dict[str, Run] = {}
    for case in plan.cases:
        starting(case)
        runs[case.name] = train_run(case, training)
        yield runs[case.name]
        for pair in plan.pairs:
            names = (pair.plain.name, pair.technique.name)
            if case.name in names and all(name in runs for name in names):
                yield compare(pair, runs[names[0]], runs[names[1]], training)


def check_fit(cases: Sequence[Case], volume: LabelledVolume) -> None:
    """Raise MembenchError if a case's network has fewer classes than the volume."""
    for case in cases:
        classes = find_network(case.network).output_channels(case.network_options)
        if classes < len(volume.class_names):
            raise MembenchError(
                f"case {case.name} has {classes} classes and {volume.name} "
                f"{len(volume.class_names)}: give its network more, or the volume fewer labels"
            )


def train_run(case: Case, training: Training) -> Run:
    """Train one case from the common seed, on crops of the size of its shape.

    Raises MembenchError where the GPU's memory does not hold it.
    """
    case = _as_trained(case, training)
    readings: list[Reading] = []
    status: Literal["ok", "diverged"] = "ok"
    reason = ""
    started = time.perf_counter()
    try:
        with _repeatable():
            for reading in _readings(case, training):
                readings.append(reading)
    except DivergedError as error:
        status, reason = "diverged", str(error)
    except torch.OutOfMemoryError as error:
        raise MembenchError(
            f"case {case.name} does not fit on this GPU: leave it out with --case, or give it a "
            f"smaller shape ({str(error).splitlines()[0]})"
        ) from None
    return Run(
        case=case,
        readings=tuple(readings),
        time_s=time.perf_counter() - started,
        status=status,
        reason=reason,
    )


def _readings(case: Case, training: Training) -> Iterator[Reading]:
    settings, spec = training.settings, find_network(case.network)
    order = spec.input_sides((0, 1, 2))
    crops = random_crops(training.volume, case.shape, case.batch_size, training.seed)
    workload = build_workload(case, lambda _phase: None, training.device)
    assert workload.optimizer is not None  # the suite lets only mode "train" through
    return train(
        workload,
        (in_order(batch, order) for batch in crops),
        steps=training.steps,
        seed=training.seed,
        schedule=make_schedule(
            workload.optimizer, settings.schedule.name, settings.schedule.options
        ),
        steps_per_epoch=settings.steps_per_epoch,
        evaluate=_whole_dice(training, spec, case),
        evaluate_every=settings.dice_every,
    )


def _as_trained(case: Case, training: Training) -> Case:
    """Return the case with the common seed, and a precision that its device computes in."""
    precision = case.precision
    if training.device == "cpu" and precision == "fp16":
        precision = training.settings.cpu_precision
    return dataclasses.replace(case, seed=training.seed, precision=precision)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Have cuDNN take the same, deterministic algorithms every time."""
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _whole_dice(
    training: Training, spec: NetworkSpec, case: Case
) -> Callable[[nn.Module], list[float]]:
    """Return what takes Dice of each class but the background over the whole volume."""
    batch = whole(training.volume, spec.divisor(case.network_options))
    images, labels = in_order(batch, spec.input_sides((0, 1, 2)))
    images = images.to(training.device)
    classes = len(training.volume.class_names)

    def dice(model: nn.Module) -> list[float]:
        found: Tensor = model(images).argmax(dim=1).cpu()
        return _dice(found, labels, classes)

    return dice


def _dice(found: Tensor, labels: Tensor, classes: int) -> list[float]:
    """Return Dice of classes 1 and up where labels are known, 1 for a class that is in neither."""
    known = labels >= 0
    parts = [
        torch.stack([(part == c) & known for c in range(classes)], dim=1).float()
        for part in (found, labels)
    ]
    by_class = require_metrics().compute_dice(*parts, include_background=False, ignore_empty=False)
    return [float(value) for value in by_class[0]]


def compare(pair: Pair, plain: Run, technique: Run, training: Training) -> Comparison:
    """Hold a technique's run against the plain one, by step if it must be exact, else by epoch."""
    exact = pair.band is None
    band = pair.band
    if band is None:
        band = 0.0 if training.device == "cpu" else CUDA_ROUNDING
    by_step = _largest(plain.losses, technique.losses)
    difference, step = by_step
    if not exact:
        length = training.settings.steps_per_epoch
        difference, epoch = _largest(plain.epoch_losses(length), technique.epoch_losses(length))
        step = min(epoch * length, training.steps)
    if "diverged" in (plain.status, technique.status):
        difference, step = math.inf, min(len(plain.readings), len(technique.readings)) + 1
    return Comparison(
        plain=plain.case.name,
        technique=technique.case.name,
        exact=exact,
        band=band,
        difference=difference,
        step=step,
        step_difference=by_step[0],
    )


def _largest(plain: Sequence[float], technique: Sequence[float]) -> tuple[float, int]:
    """Return the largest difference and its place, counted from 1; of what both have."""
    differences = [abs(a - b) for a, b in zip(plain, technique, strict=False)]
    largest = max(differences, default=0.0)
    return largest, differences.index(largest) + 1 if differences else 0


def run_line(run: Run, training: Training) -> dict[str, Any]:
    """Return a run as JSON-ready data."""
    return {
        "kind": "run",
        "evidence": "measured",
        "case": run.case.name,
        "variant": run.case.variant,
        "shape": list(run.case.shape),
        "batch_size": run.case.batch_size,
        "precision": run.case.precision,
        "status": run.status,
        "reason": run.reason,
        "device": training.device,
        "volume": training.volume.name,
        "volume_shape": list(training.volume.shape),
        "spacing_mm": training.settings.spacing_mm,
        "seed": training.seed,
        "steps": training.steps,
        "steps_per_epoch": training.settings.steps_per_epoch,
        "time_s": round(run.time_s, 3),
        "loss": run.losses,
        "learning_rate": [reading.learning_rate for reading in run.readings],
        "skipped_steps": [reading.step for reading in run.readings if reading.skipped],
        "classes": list(training.volume.class_names[1:]),
        "dice": [{"step": step, "dice": list(scores)} for step, scores in run.dice],
        "definition": run.case.to_definition(),
    }


def comparison_line(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON-ready data; a difference that is infinite is None."""
    data = dataclasses.asdict(comparison)
    if math.isinf(comparison.difference):
        data["difference"] = None
    return {"kind": "comparison", "evidence": "measured", **data, "inside": comparison.inside}
