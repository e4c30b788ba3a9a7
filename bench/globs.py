"""Which cases are meant by one glob of their names, or by several: all that any of them matches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

__all__ = ["Globs", "choose", "listed"]

Globs = str | Sequence[str] | None
"""One glob, several, or none: then everything is meant."""

Item = TypeVar("Item")


def listed(globs: Globs) -> list[str]:
    """Return the globs, none where everything is meant."""
    return [globs] if isinstance(globs, str) else list(globs or ())


def choose(
    items: Iterable[Item], globs: Globs, names: Callable[[Item], Iterable[str]]
) -> tuple[list[Item], str | None]:
    """Return the items one of whose names a glob matches, and the first glob that matches none.

    The items keep their order, and each is there once.
    """
    every, wanted = list(items), listed(globs)
    if not wanted:
        return every, None
    matched = [[_matches(names(item), glob) for item in every] for glob in wanted]
    kept = [item for item, row in zip(every, zip(*matched, strict=True), strict=True) if any(row)]
    return kept, next((g for g, row in zip(wanted, matched, strict=True) if not any(row)), None)


def _matches(names: Iterable[str], glob: str) -> bool:
    return any(name == glob or fnmatchcase(name, glob) for name in names)
