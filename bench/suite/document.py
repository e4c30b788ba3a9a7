"""YAML with a line number for every value, so that a mistake can be pointed at.

Read as YAML 1.2's core types (``no`` and ``on`` are text, ``4e-4`` is a number), by no constructor
but our own. Refused, with the line: keys given twice, aliases (one value, one place), tags, nesting
beyond ``MAX_DEPTH`` and files beyond ``MAX_FILE_BYTES``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.errors import SuiteError

__all__ = ["MAX_DEPTH", "MAX_FILE_BYTES", "Document", "Mistake", "Place", "read_document"]

MAX_FILE_BYTES = 262_144
MAX_DEPTH = 16

Place = tuple[str | int, ...]
"""The keys and indices from the file's root to a value: ``("matrix", "shapes", 2)``."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something wrong at a place of a suite file, as a sentence without its place."""

    place: Place
    text: str
    also: Place | None = None  # a second place that the sentence ends by naming


@dataclass(frozen=True, slots=True)
class Document:
    """A file's data, and the line at which each of its values (or its key) stands."""

    label: str  # the file as the user named it
    data: dict[str, Any]
    lines: dict[Place, int]

    def known(self, place: Place) -> Place:
        """Return the longest beginning of ``place`` that stands in the file."""
        while place not in self.lines:
            place = place[:-1]
        return place

    def line(self, place: Place) -> int:
        """Return the line of ``place``, or of what holds it."""
        return self.lines[self.known(place)]

    def error(self, mistakes: Iterable[Mistake]) -> SuiteError:
        """Return the error that tells the first of ``mistakes``, by line, and how many follow.

        Of several at one place only the first counts.
        """
        by_place: dict[Place, Mistake] = {}
        for mistake in mistakes:
            by_place.setdefault(mistake.place, mistake)
        first, *others = sorted(by_place.values(), key=lambda mistake: self.line(mistake.place))
        text = first.text
        if first.also is not None:
            text += f" {self._dotted(first.also)} (line {self.line(first.also)})"
        if place := self._dotted(first.place):
            text = f"{place}: {text}"
        more = f" (and {len(others)} more)" if others else ""
        return SuiteError(f"{self.label}, line {self.line(first.place)}: {text}{more}")

    def _dotted(self, place: Place) -> str:
        steps = self.known(place)
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
        return text.removeprefix(".")


def read_document(path: Path, content: bytes) -> Document:
    """Return the mapping that ``content``, the bytes of the YAML file ``path``, holds.

    Raises SuiteError, in one line with the line number, for anything that is not such a mapping.
    """
    if len(content) > MAX_FILE_BYTES:
        raise SuiteError(f"{path} has {len(content)} bytes, over the limit of {MAX_FILE_BYTES}")
    root = _root(path, content)
    if root is None:
        raise SuiteError(f"{path} is empty; a suite needs a title and a matrix")
    builder = _Builder(path)
    data = builder.build(root, ())
    if not isinstance(data, dict):
        raise SuiteError(f"{path}, line 1: a suite is a mapping (title: ...), not {_kind(data)}")
    return Document(label=str(path), data=data, lines=builder.lines)


def _root(path: Path, content: bytes) -> yaml.Node | None:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SuiteError(f"{path}, line {line}: not UTF-8 text") from None
    try:
        return _compose(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise SuiteError(f"{path}, line {line}: not YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SuiteError(f"{path}, line {line}: not YAML: a control character") from None


def _kind(data: Any) -> str:
    return "a list" if isinstance(data, list) else f"{data!r:.40}"


class _Loader(yaml.SafeLoader):
    """Composes nodes with our few implicit types; constructs nothing."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way to say it
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read here", problem_mark=mark)
        if self.depth >= MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]{1,18}", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


class _Builder:
    """Turns nodes into plain data and notes their lines on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Place, int] = {}

    def build(self, node: yaml.Node, place: Place) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(place, line)  # a mapping's value is found at its key's line
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.build(child, (*place, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, place)
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            value = _SCALARS[kind](node.value)
            if isinstance(value, float) and not math.isfinite(value):
                raise self._error(line, f"{node.value} is too large for a number")
            return value
        raise self._error(line, f"the tag {node.tag!r:.60} is not read here")

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(line, "a key must be text, not a list or a mapping")
            key = key_node.value
            if key in mapping:
                first = self.lines[(*place, key)]
                raise self._error(line, f"key {key!r} stands here and at line {first} already")
            self.lines[(*place, key)] = line
            mapping[key] = self.build(value_node, (*place, key))
        return mapping

    def _error(self, line: int, text: str) -> SuiteError:
        return SuiteError(f"{self.path}, line {line}: {text}")


_SCALARS: dict[str, Any] = {
    "null": lambda _text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": float,
    "str": str,
}
