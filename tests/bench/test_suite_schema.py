"""The JSON schema that editors read."""

from __future__ import annotations

import json

import pytest

from bench.cli.schema import schema
from bench.suite import suite_json_schema


def test_the_command_prints_the_schema_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    schema()
    assert json.loads(capsys.readouterr().out) == suite_json_schema()


def test_the_schema_knows_every_key_and_allows_no_other() -> None:
    data = suite_json_schema()
    assert data["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert data["required"] == ["title"]
    assert data["additionalProperties"] is False
    assert list(data["properties"]) == [
        *("title", "description", "card", "time_limit_s", "cudnn_benchmark", "baseline"),
        *("training", "matrix", "include", "exclude", "volumes", "paper", "parity"),
    ]


def test_the_schema_takes_the_short_forms_too() -> None:
    """A shape, a technique and an optimizer may be plain text, a figure a number."""
    definitions = suite_json_schema()["$defs"]
    shapes = definitions["Matrix"]["properties"]["shapes"]["items"]["anyOf"]
    assert [kind.get("type") or kind["$ref"] for kind in shapes] == [
        "string",
        "#/$defs/ShapeEntry",
    ]
    techniques = definitions["NetworkEntry"]["properties"]["techniques"]["items"]["anyOf"]
    assert {"type": "string"} in techniques
    assert {"type": "string"} in definitions["Training"]["properties"]["optimizer"]["anyOf"]
    figures = definitions["Paper"]["properties"]["figures"]["additionalProperties"]
    assert {"type": "number"} in figures["additionalProperties"]["anyOf"]


def test_the_schema_leaves_room_for_options_where_they_go() -> None:
    definitions = suite_json_schema()["$defs"]
    open_ended = {name for name, kind in definitions.items() if kind["additionalProperties"]}
    named = {"TechniqueEntry", "OptimizerEntry", "ScheduleEntry"}
    assert open_ended == {"NetworkEntry", "IncludeEntry", *named}
