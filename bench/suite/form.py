"""The form of a suite file checked: pydantic's errors as mistakes with places and near names."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bench.errors import nearest
from bench.suite.document import Document, Mistake
from bench.suite.schema import SuiteFile

__all__ = ["check_form"]

# pydantic's words for these are Python's, not YAML's
_FORMS = {
    "model_type": "should be a mapping (key: value)",
    "dict_type": "should be a mapping (key: value)",
    "list_type": "should be a list ([a, b])",
    "string_type": "should be text",
}


def check_form(document: Document) -> SuiteFile:
    """Return the suite that ``document`` holds, or raise SuiteError for its first mistake."""
    try:
        return SuiteFile.model_validate(document.data)
    except ValidationError as error:
        raise document.error([_mistake(details) for details in error.errors()]) from None


def _mistake(details: ErrorDetails) -> Mistake:
    place, given = details["loc"], details["input"]
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields(place[:-1])
        return Mistake(place, f"unknown key{nearest(str(place[-1]), known)}")
    if kind == "missing":
        return Mistake(place[:-1], f"{place[-1]!r} is missing")
    if kind == "value_error":
        return Mistake(place, str(context["error"]))
    if kind == "literal_error":
        return Mistake(place, f"{given!r} is not {context['expected']}")
    if kind in ("too_short", "string_too_short"):
        return Mistake(place, "should not be empty")
    text = _FORMS.get(kind) or details["msg"].removeprefix("Input ")
    return Mistake(place, f"{text}, got {_shown(given)}")


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fields(place: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the model that stands at ``place``."""
    kind: Any = SuiteFile
    for step in place:
        models = [k for k in _parts(kind) if isinstance(k, type) and issubclass(k, BaseModel)]
        if isinstance(step, str) and models:
            kind = models[0].model_fields[step].annotation
    models = [k for k in _parts(kind) if isinstance(k, type) and issubclass(k, BaseModel)]
    return [field.alias or name for name, field in models[0].model_fields.items()]


def _parts(kind: Any) -> Iterator[Any]:
    """Yield ``kind``, or what lists, unions and annotations are made of."""
    arguments = typing.get_args(kind)
    if not arguments:
        yield kind
    for argument in arguments:
        yield from _parts(argument)
