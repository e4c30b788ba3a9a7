"""The section ``parity`` of a suite file: what ``membench parity`` trains, and with what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bench.suite.entries import AnySchedule, ScheduleEntry, Strict

__all__ = ["Parity", "ParityFigure", "ParityPair"]


class ParityFigure(Strict):
    """Runs whose curves stand in one picture of ``membench parity``."""

    title: str = Field(min_length=1)
    cases: list[str] = Field(min_length=1, description="Names of cases, or globs of them.")
    note: str = Field(default="", description="What a paper says, printed beside what is found.")


class ParityPair(Strict):
    """A run with a technique, and the plain one that it must follow from the same seed."""

    plain: str = Field(description="The name of one case, or a glob that only it matches.")
    technique: str = Field(description="The name of one case, or a glob that only it matches.")
    band: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="How far the loss, averaged over an epoch, may lie from the plain run's. Exact "
        "techniques need none: every step's loss must be equal.",
    )


class Parity(Strict):
    """What ``membench parity`` trains the suite's cases with; ``membench run`` ignores it."""

    figures: list[ParityFigure] = []
    pairs: list[ParityPair] = []
    steps: Annotated[int, Field(gt=0)] = 200
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Of weights, crops and dropout of every run."
    )
    steps_per_epoch: Annotated[int, Field(gt=0)] = Field(
        default=10, description="What an epoch is to the schedule, and to the bands."
    )
    schedule: AnySchedule = ScheduleEntry(name="plateau")
    dice_every: Annotated[int, Field(gt=0)] = Field(
        default=20, description="Steps from one Dice over the whole volume to the next."
    )
    spacing_mm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=3.0, description="The volume is resampled to voxels of this side."
    )
    cpu_precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="Instead of fp16 on a CPU, which few compute in."
    )

    @model_validator(mode="after")
    def _some_run(self) -> Parity:
        if not self.figures and not self.pairs:
            raise ValueError("says nothing to train: give figures, or pairs, or both")
        return self
