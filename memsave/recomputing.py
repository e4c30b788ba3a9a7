"""A mark on what a technique computes a second time, for whoever counts operations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["computed_again", "is_computed_again"]

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
