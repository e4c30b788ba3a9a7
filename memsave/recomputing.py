"""Marks for whoever counts operations or bytes: what is computed twice, and in whose name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["computed_again", "is_computed_again", "running", "running_name"]

_scopes = threading.local()


@contextmanager
def computed_again() -> Iterator[None]:
    """Say that what runs inside has been computed before in this step, and was not kept."""
    _scopes.depth = getattr(_scopes, "depth", 0) + 1
    try:
        yield
    finally:
        _scopes.depth -= 1


def is_computed_again() -> bool:
    """Whether this thread is inside ``computed_again``."""
    return getattr(_scopes, "depth", 0) > 0


@contextmanager
def running(name: str) -> Iterator[None]:
    """Say in whose name runs what no module's call shows, as a level that is run by its slabs."""
    before = running_name()
    _scopes.name = name
    try:
        yield
    finally:
        _scopes.name = before


def running_name() -> str:
    """Return the name given to ``running`` in this thread; "" outside of it."""
    return str(getattr(_scopes, "name", ""))
