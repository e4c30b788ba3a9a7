"""What commands that take a network have in common: options of one meaning, and their texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.case import Mode
from bench.errors import MembenchError

if TYPE_CHECKING:
    from bench.case import TechniqueUse

__all__ = [
    "ModeOption",
    "OptimizerOption",
    "TargetOption",
    "parse_arguments",
    "parse_techniques",
]

OptimizerOption = Annotated[str, typer.Option(help="By name, or module:callable.")]
ModeOption = Annotated[Mode, typer.Option(help="Train, or run one forward.")]
TargetOption = Annotated[
    str | None, typer.Option(help="Like --input; by default class indices as the loss needs.")
]


def parse_arguments(text: str) -> dict[str, Any]:
    """Return the JSON object that ``text`` is.

    Errors: MembenchError for anything else.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise MembenchError(f"--arguments {text!r} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise MembenchError(f'--arguments {text!r} is no JSON object: write {{"name": value}}')
    return data


def parse_techniques(text: str) -> tuple[TechniqueUse, ...]:
    """Return the techniques of ``a,b``, or of JSON: ``["a", {"checkpoint": {"every": 2}}]``.

    Errors: MembenchError for names and options that do not exist.
    """
    from bench.prediction import technique_uses

    stripped = text.strip()
    if not stripped.startswith(("[", "{")):
        return technique_uses([name.strip() for name in stripped.split(",") if name.strip()])
    try:
        data = json.loads(stripped)
    except json.JSONDecodeError as error:
        raise MembenchError(f"--techniques {text!r} is no JSON: {error}") from None
    return technique_uses(data)
