"""What a suite file may hold: pydantic models, whose JSON schema editors read.

Names of networks, techniques and cards are checked elsewhere (``names``): here is only the form.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from bench.case import Mode, PaperFigure, Precision
from bench.errors import SuiteError
from bench.shapes import Shape, parse_inplane, parse_shape

__all__ = [
    "AnyEntry",
    "ExcludeEntry",
    "IncludeEntry",
    "Matrix",
    "NetworkEntry",
    "OptimizerEntry",
    "Paper",
    "ShapeEntry",
    "SuiteFile",
    "TechniqueEntry",
    "Training",
    "VolumesEntry",
]

_UNIT_BYTES = {"GB": 10**9, "GiB": 2**30}
_FIGURE = re.compile(r"([>~]?) *([0-9]+(?:\.[0-9]+)?)")
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


def _figure(value: Any) -> Any:
    """Accept 3.7, "> 32" and "~30.2"; keep them as text."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    match = _FIGURE.fullmatch(text) if isinstance(text, str) else None
    if match is None or not Decimal(match[2]):  # ratios are taken to it, so none is 0
        raise ValueError(f"a paper's figure is 3.7, '> 32' or '~30.2', got {value!r}")
    return text


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _shaped(value: Any) -> Any:
    if isinstance(value, str):
        return {"shape": value}
    if not isinstance(value, dict):
        raise ValueError(f"a shape is 96x96x96 or {{shape: 96x96x90, pad: true}}, got {value!r}")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Optioned(BaseModel):
    """A name, and options that the thing named will check."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        """What the file gives beyond the fields that are ours."""
        return dict(self.model_extra or {})


Variant = Annotated[str, AfterValidator(_variant)]
ShapeText = Annotated[str, AfterValidator(_shape), Field(examples=["96x96x96"])]
InplaneText = Annotated[str, AfterValidator(_inplane), Field(examples=["256x256"])]
Figure = Annotated[str, BeforeValidator(_figure, json_schema_input_type=str | float)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
BatchSize = Annotated[int, Field(gt=0)]


class ShapeEntry(_Strict):
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


class TechniqueEntry(_Optioned):
    """A technique of memsave; its options are the keys beside ``name``."""

    name: str


class OptimizerEntry(_Optioned):
    """An optimizer; its options, such as ``lr``, are the keys beside ``name``."""

    name: str


AnyShape = Annotated[
    ShapeEntry, BeforeValidator(_shaped, json_schema_input_type=ShapeText | ShapeEntry)
]
AnyTechnique = Annotated[
    TechniqueEntry, BeforeValidator(_named, json_schema_input_type=str | TechniqueEntry)
]
AnyOptimizer = Annotated[
    OptimizerEntry, BeforeValidator(_named, json_schema_input_type=str | OptimizerEntry)
]


class Training(_Strict):
    """What one training step minimises, and with what."""

    loss: str | None = Field(default=None, description="If none, the loss of the network's paper.")
    optimizer: AnyOptimizer = OptimizerEntry(name="adam")
    steps: Annotated[int, Field(gt=0)] = Field(
        default=2, description="Steps that memory is taken over; the second has optimizer state."
    )


class AnyEntry(_Optioned):
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


class NetworkEntry(AnyEntry):
    """A row of the table. Keys that are not listed here are options of the network."""

    name: str = Field(description="The network, by its name in memsave.")


class IncludeEntry(AnyEntry):
    """A single case beside the matrix. Keys not listed here are options of the network."""

    network: str = Field(description="The network, by its name in memsave.")
    shape: AnyShape
    paper: Figure | None = Field(default=None, description="The paper's figure for this case.")


class Matrix(_Strict):
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


class ExcludeEntry(_Strict):
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


class VolumesEntry(_Strict):
    """How shapes are taken from a folder of volumes (``--volumes``); they are always padded."""

    crop: InplaneText | None = Field(
        default=None, description="Limit of the in-plane sides, 256x256."
    )

    @property
    def limit(self) -> tuple[int, int] | None:
        """The in-plane limit as numbers."""
        return None if self.crop is None else parse_inplane(self.crop)


class Paper(_Strict):
    """The figures a paper prints: variant, then shape as the suite writes it, then the figure."""

    citation: str
    unit: Literal["GB", "GiB"] = Field(description="GB: 10^9 bytes. GiB: 2^30 bytes.")
    mode: Mode = Field(default="train", description="The mode whose cases the figures belong to.")
    figures: dict[str, dict[str, Figure]] = {}

    def figure(self, text: str) -> PaperFigure:
        """Return a figure of ``figures`` with its unit and its bytes."""
        match = _FIGURE.fullmatch(text)
        assert match is not None  # _figure let it in
        relation: Literal["=", "~", ">"] = match[1] or "="  # type: ignore[assignment]
        value = int(Decimal(match[2]) * _UNIT_BYTES[self.unit])
        return PaperFigure(text=f"{text} {self.unit}", relation=relation, bytes=value)


class SuiteFile(_Strict):
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

    @model_validator(mode="after")
    def _some_cases(self) -> SuiteFile:
        if self.matrix is None and not self.include:
            raise ValueError("the suite has no cases: give a matrix, or include single cases")
        return self
