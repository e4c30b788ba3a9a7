"""Errors that a user can repair. Anything else is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable

__all__ = ["MembenchError", "SuiteError", "nearest"]


class MembenchError(Exception):
    """What is wrong, what was given and what to do next, in one line. Exit code 2."""


class SuiteError(MembenchError):
    """A suite file, or a case made from one, that cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"``, or the known names when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f" (did you mean {' or '.join(repr(c) for c in close)}?)"
    return f" (known: {', '.join(names)})" if names else ""
