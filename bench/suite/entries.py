"""What the parts of a suite file's schema are made of: strict mappings, and things with options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = ["AnySchedule", "Optioned", "ScheduleEntry", "Strict", "named"]


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
