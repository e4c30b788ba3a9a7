"""What a suite file may hold: pydantic models, whose JSON schema editors read.

Names of networks, techniques and cards are checked elsewhere (``names``): here is only the form.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from bench.case import Mode, PaperFigure, PaperTime, Precision
from bench.errors import SuiteError
from bench.shapes import Shape, parse_inplane, parse_shape
from bench.suite.entries import (
    AnyNetwork,
    AnySchedule,
    Optioned,
    ScheduleEntry,
    SomeNetwork,
    Strict,
    named,
)
from bench.suite.parity_schema import Parity

__all__ = [
    "AnyEntry",
    "ExcludeEntry",
    "FigureEntry",
    "IncludeEntry",
    "Matrix",
    "NetworkEntry",
    "OptimizerEntry",
    "Paper",
    "Parity",
    "ScheduleEntry",
    "ShapeEntry",
    "SuiteFile",
    "TechniqueEntry",
    "Training",
    "VolumesEntry",
]

_UNIT_BYTES = {"GB": 10**9, "GiB": 2**30}
_FIGURE = re.compile(r"([>~]?) *([0-9]+(?:\.[0-9]+)?)")
_TIME = re.compile(r"([<>~]?) *([0-9]+(?:\.[0-9]+)?)")
_VARIANT = re.compile(r"[A-Za-z0-9._+-]+")


def _variant(text: str) -> str:
    if not _VARIANT.fullmatch(text):
        raise ValueError(f"a variant has letters, digits and . _ + - only, got {text!r}")
    return text


def _shape(text: str) -> str:
    try:
        parse_shape(text)
    except SuiteError as error:
        raise ValueError(str(error)) from None
    return text


def _inplane(text: str) -> str:
    try:
        parse_inplane(text)
    except SuiteError as error:
        raise ValueError(str(error)) from None
    return text


def _printed(value: Any, form: re.Pattern[str]) -> str | None:
    """Return a figure as text, None where it has not the form or is 0: ratios are taken to it."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    match = form.fullmatch(text) if isinstance(text, str) else None
    return text if match is not None and Decimal(match[2]) else None


def _figure(value: Any) -> Any:
    """Accept 3.7, "> 32" and "~30.2"; keep them as text."""
    text = _printed(value, _FIGURE)
    if text is None:
        raise ValueError(f"a paper's figure is 3.7, '> 32' or '~30.2', got {value!r}")
    return text


def _time(value: Any) -> Any:
    """Accept 12, "< 105" and "~30"; keep them as text."""
    text = _printed(value, _TIME)
    if text is None:
        raise ValueError(f"a paper's time is 12, '< 105', '> 60' or '~30', got {value!r}")
    return text


def _figured(value: Any) -> Any:
    return value if isinstance(value, dict) else {"memory": _figure(value)}


def _shaped(value: Any) -> Any:
    if isinstance(value, str):
        return {"shape": value}
    if not isinstance(value, dict):
        raise ValueError(f"a shape is 96x96x96 or {{shape: 96x96x90, pad: true}}, got {value!r}")
    return value


Variant = Annotated[str, AfterValidator(_variant)]
ShapeText = Annotated[str, AfterValidator(_shape), Field(examples=["96x96x96"])]
InplaneText = Annotated[str, AfterValidator(_inplane), Field(examples=["256x256"])]
Figure = Annotated[str, BeforeValidator(_figure, json_schema_input_type=str | float)]
TimeFigure = Annotated[str, BeforeValidator(_time, json_schema_input_type=str | float)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
BatchSize = Annotated[int, Field(gt=0)]


class ShapeEntry(Strict):
    """An input shape: x, y, slices."""

    shape: ShapeText
    pad: bool = Field(default=False, description="Pad each side up to what the network pools.")
    crop: InplaneText | None = Field(
        default=None, description="Limit of the in-plane sides, 256x256."
    )

    @property
    def sides(self) -> Shape:
        """The shape as numbers."""
        return parse_shape(self.shape)

    @property
    def limit(self) -> tuple[int, int] | None:
        """The in-plane limit as numbers."""
        return None if self.crop is None else parse_inplane(self.crop)


class FigureEntry(Strict):
    """What a paper prints for a case: its memory alone, or any of these by name."""

    memory: Figure | None = Field(default=None, description="In the paper's unit.")
    time_s: TimeFigure | None = Field(default=None, description="Seconds: 12, '< 105', '~30'.")
    flops: Annotated[int, Field(gt=0)] | None = Field(default=None, description="As printed.")

    @model_validator(mode="after")
    def _some_figure(self) -> FigureEntry:
        if self.memory is None and self.time_s is None and self.flops is None:
            raise ValueError("say what the paper prints: memory, time_s or flops")
        return self


AnyFigure = Annotated[
    FigureEntry, BeforeValidator(_figured, json_schema_input_type=str | float | FigureEntry)
]


class TechniqueEntry(Optioned):
    """A technique of memsave; its options are the keys beside ``name``."""

    name: str


class OptimizerEntry(Optioned):
    """An optimizer; its options, such as ``lr``, are the keys beside ``name``."""

    name: str


AnyShape = Annotated[
    ShapeEntry, BeforeValidator(_shaped, json_schema_input_type=ShapeText | ShapeEntry)
]
AnyTechnique = Annotated[
    TechniqueEntry, BeforeValidator(named, json_schema_input_type=str | TechniqueEntry)
]
AnyOptimizer = Annotated[
    OptimizerEntry, BeforeValidator(named, json_schema_input_type=str | OptimizerEntry)
]


class Training(Strict):
    """What one training step minimises, and with what."""

    loss: str | None = Field(default=None, description="If none, the loss of the network's paper.")
    optimizer: AnyOptimizer = OptimizerEntry(name="adam")
    schedule: AnySchedule | None = Field(
        default=None, description="The learning rate's, such as poly; a step counts as an epoch."
    )
    steps: Annotated[int, Field(gt=0)] = Field(
        default=2, description="Steps that memory is taken over; the second has optimizer state."
    )


class AnyEntry(Optioned):
    """What a row of the table and a single case have in common."""

    variant: Variant = Field(description="The row's name in tables and in the names of cases.")
    precision: Precision | None = Field(
        default=None, description="Fixes what the matrix would vary."
    )
    batch: BatchSize | None = Field(default=None, description="Fixes what the matrix would vary.")
    mode: Mode | None = Field(default=None, description="Fixes what the matrix would vary.")
    techniques: list[AnyTechnique] = []
    training: Training | None = Field(default=None, description="Instead of the suite's.")
    time_limit_s: Seconds | None = Field(default=None, description="Instead of the suite's.")
    card: str | None = Field(
        default=None, description="Predict this row for this card instead of the suite's."
    )
    cudnn_benchmark: bool | None = Field(default=None, description="Instead of the suite's.")


class NetworkEntry(AnyEntry):
    """A row of the table. Keys that are not listed here are options of the network."""

    name: str = Field(default="", description="The network, by its name in memsave.")
    network: SomeNetwork | None = Field(
        default=None, description="Instead of name: a network of your own, by its import."
    )
    shapes: Annotated[list[AnyShape], Field(min_length=1)] | None = Field(
        default=None, description="Instead of the matrix's; without part in --volumes."
    )

    @model_validator(mode="after")
    def _some_network(self) -> NetworkEntry:
        if not self.name and self.network is None:
            raise ValueError("'name' is missing")
        if self.network is not None and self.network.import_ is None:
            raise ValueError("network: is for one of your own, with import:; name: is memsave's")
        return self


class IncludeEntry(AnyEntry):
    """A single case beside the matrix. Keys not listed here are options of the network."""

    network: AnyNetwork = Field(
        description="The network, by its name in memsave, or one of your own, by its import."
    )
    shape: AnyShape
    paper: AnyFigure | None = Field(default=None, description="The paper's figure for this case.")


class Matrix(Strict):
    """Every network at every shape, batch size, precision and mode."""

    networks: list[NetworkEntry] = Field(min_length=1)
    shapes: list[AnyShape] = Field(min_length=1)
    batch: list[BatchSize] = Field(default=[1], min_length=1)
    precision: list[Precision] = Field(default=["fp32"], min_length=1)
    mode: list[Mode] = Field(default=["train"], min_length=1)

    @field_validator("batch", "precision", "mode")
    @classmethod
    def _no_value_twice(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError(f"a value stands here twice: {values}")
        return values


class ExcludeEntry(Strict):
    """Cases of the matrix to leave out: those that match every key given, by globs."""

    network: str | None = None
    variant: str | None = None
    shape: str | None = None
    mode: str | None = None
    precision: str | None = None
    batch: BatchSize | None = None

    @model_validator(mode="after")
    def _some_key(self) -> ExcludeEntry:
        if not self.model_fields_set:
            raise ValueError("say what to leave out: network, variant, shape, mode, ...")
        return self


class VolumesEntry(Strict):
    """How shapes are taken from a folder of volumes (``--volumes``); they are always padded."""

    crop: InplaneText | None = Field(
        default=None, description="Limit of the in-plane sides, 256x256."
    )

    @property
    def limit(self) -> tuple[int, int] | None:
        """The in-plane limit as numbers."""
        return None if self.crop is None else parse_inplane(self.crop)


class Paper(Strict):
    """The figures a paper prints: variant, then shape as the suite writes it, then the figure."""

    citation: str
    unit: Literal["GB", "GiB"] = Field(description="GB: 10^9 bytes. GiB: 2^30 bytes.")
    mode: Mode = Field(default="train", description="The mode whose cases the figures belong to.")
    note: str = Field(default="", description="What a reader must know to compare the two.")
    figures: dict[str, dict[str, AnyFigure]] = {}

    def of_case(self, entry: FigureEntry | None) -> dict[str, Any]:
        """Return an entry's figures as the fields of a Case: with their unit, in bytes and s."""
        if entry is None:
            return {}
        return {
            "paper": None if entry.memory is None else self._memory(entry.memory),
            "paper_time": None if entry.time_s is None else _paper_time(entry.time_s),
            "paper_flops": entry.flops,
        }

    def _memory(self, text: str) -> PaperFigure:
        match = _FIGURE.fullmatch(text)
        assert match is not None  # _figure let it in
        relation: Literal["=", "~", ">"] = match[1] or "="  # type: ignore[assignment]
        value = int(Decimal(match[2]) * _UNIT_BYTES[self.unit])
        return PaperFigure(text=f"{text} {self.unit}", relation=relation, bytes=value)


def _paper_time(text: str) -> PaperTime:
    match = _TIME.fullmatch(text)
    assert match is not None  # _time let it in
    relation: Literal["=", "~", ">", "<"] = match[1] or "="  # type: ignore[assignment]
    return PaperTime(text=f"{text} s", relation=relation, seconds=float(match[2]))


class SuiteFile(Strict):
    """A suite of membench: networks x shapes, and what a paper says of them."""

    title: str = Field(min_length=1)
    description: str = ""
    card: str | None = Field(
        default=None, description="Predict for this card unless told otherwise."
    )
    time_limit_s: Seconds = Field(default=600.0, description="A case that takes longer is stopped.")
    cudnn_benchmark: bool = False
    baseline: str | None = Field(default=None, description="The variant that ratios are taken to.")
    training: Training = Training()
    matrix: Matrix | None = None
    include: list[IncludeEntry] = []
    exclude: list[ExcludeEntry] = []
    volumes: VolumesEntry = VolumesEntry()
    paper: Paper | None = None
    parity: Parity | None = None

    @model_validator(mode="after")
    def _some_cases(self) -> SuiteFile:
        if self.matrix is None and not self.include:
            raise ValueError("the suite has no cases: give a matrix, or include single cases")
        return self
