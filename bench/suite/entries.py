"""What the parts of a suite file's schema are made of: strict mappings, and things with options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bench.imported import Imported

__all__ = [
    "AnyNetwork",
    "AnySchedule",
    "Optioned",
    "ScheduleEntry",
    "SomeNetwork",
    "Strict",
    "named",
]


def named(value: Any) -> Any:
    """Accept a plain name where a mapping with ``name`` may stand."""
    return {"name": value} if isinstance(value, str) else value


class Strict(BaseModel):
    """A mapping of these keys and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Optioned(BaseModel):
    """A name, and options that the thing named will check."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        """What the file gives beyond the fields that are ours."""
        return dict(self.model_extra or {})


class ScheduleEntry(Optioned):
    """A learning-rate schedule; its options, such as ``epochs``, are the keys beside ``name``."""

    name: str


AnySchedule = Annotated[
    ScheduleEntry, BeforeValidator(named, json_schema_input_type=str | ScheduleEntry)
]


class SomeNetwork(Strict):
    """A network: one of memsave's by name, or any other by where it can be imported from."""

    name: str | None = Field(
        default=None, description="One of memsave's; with import, what it is called in tables."
    )
    import_: str | None = Field(
        default=None,
        alias="import",
        description="package.module:factory, or path/to/file.py:factory.",
    )
    arguments: dict[str, Any] = Field(default={}, description="What the factory is called with.")
    in_channels: Annotated[int, Field(gt=0)] = Field(
        default=1, description="Channels of the image that it is given."
    )
    classes: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Channels that its output must have; not checked if left out."
    )
    divisor: Annotated[int, Field(gt=0)] = Field(
        default=1, description="What each side must be a multiple of; pad: true rounds up to it."
    )

    @model_validator(mode="after")
    def _named_or_imported(self) -> SomeNetwork:
        others = self.model_fields_set - {"name"}
        if self.import_ is None and (others or self.name is None):
            raise ValueError("'import' is missing: write import: package.module:factory")
        return self

    @property
    def imported(self) -> Imported | None:
        """Where it is imported from; None for one of memsave's."""
        if self.import_ is None:
            return None
        return Imported(
            reference=self.import_,
            arguments=self.arguments,
            in_channels=self.in_channels,
            classes=self.classes,
        )


AnyNetwork = Annotated[
    SomeNetwork, BeforeValidator(named, json_schema_input_type=str | SomeNetwork)
]
