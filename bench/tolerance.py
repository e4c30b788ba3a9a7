"""How much a figure may grow: a share of what it was, or a number of bytes.

Whole numbers and fractions throughout: exactly 1 % passes a tolerance of 1 %, a byte more fails.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from bench.errors import MembenchError
from bench.units import parse_bytes

__all__ = ["Tolerance", "parse_tolerance"]

_PER_CENT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*%")
_ZERO = re.compile(r"0+(?:\.0+)?")
_BARE = re.compile(r"[0-9]+(?:\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """A figure may grow by ``share`` of what it was, plus ``size_bytes``; one of the two is 0."""

    text: str
    share: Fraction = Fraction(0)
    size_bytes: int = 0

    def allowed(self, before: int | float) -> Fraction:
        """Return by how much a figure of ``before`` may grow, in its own unit."""
        return self.share * Fraction(before) + self.size_bytes

    def grew(self, before: int | float, after: int | float) -> bool:
        """Whether ``after`` is above ``before`` by more than is allowed."""
        return Fraction(after) - Fraction(before) > self.allowed(before)

    def shrank(self, before: int | float, after: int | float) -> bool:
        """Whether ``after`` is below ``before`` by more than that."""
        return Fraction(before) - Fraction(after) > self.allowed(before)


def parse_tolerance(text: str) -> Tolerance:
    """Return the tolerance that ``text`` names: "1%", "0.5 %", "5MiB", "0.5 GiB", "1024B", "0".

    Errors: MembenchError for anything else; for "5MB", which means 10^6 to some and 2^20 to
    others; and for a bare number but 0, which could be per cent or bytes.
    """
    stripped = text.strip()
    if _ZERO.fullmatch(stripped):
        return Tolerance("0")
    per_cent = _PER_CENT.fullmatch(stripped)
    if per_cent:
        return Tolerance(f"{per_cent[1]} %", share=Fraction(per_cent[1]) / 100)
    if _BARE.fullmatch(stripped):
        raise MembenchError(
            f"tolerance {text!r} has no unit: write {stripped}% or {stripped}MiB, or 0 for none"
        )
    try:
        return Tolerance(stripped, size_bytes=parse_bytes(stripped))
    except MembenchError as error:
        raise MembenchError(
            f"tolerance {error}; or per cent of what it was, as 1%, or 0 for none"
        ) from None
