"""What a caller of ``memsave`` can put right. All are ValueErrors with one complete line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackwardError",
    "InputError",
    "MemsaveError",
    "OptionError",
    "RefusedError",
    "UnknownNameError",
]


class MemsaveError(ValueError):
    """What is wrong, what was given and what to do about it, in one line."""


class UnknownNameError(MemsaveError):
    """A name that a literal table does not hold; the nearest names are offered."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        super().__init__(f"unknown {kind} {name!r}{_hint(str(name), self.known)}")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, object, tuple[str, ...]]]:
        return type(self), (self.kind, self.name, self.known)


class OptionError(MemsaveError):
    """An option of a network or technique that is unknown, ill-typed or out of range."""


class RefusedError(MemsaveError):
    """A change that would silently make a network compute something else; it was not made."""


class InputError(MemsaveError):
    """A tensor that an operation cannot take: its type, shape or place in the graph."""


class BackwardError(MemsaveError, RuntimeError):
    """A backward pass that is not to be had; a RuntimeError too, as autograd's own are."""


def _hint(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    return f" (known: {', '.join(known) or 'none'})"
