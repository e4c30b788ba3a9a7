"""Shapes as suites write them, ``96x96x96``: x, y, slices, in voxels.

A shape becomes a network's input in two moves: ``crop`` limits the in-plane sides, ``pad_to``
rounds every side up to what the network pools. Where neither was asked for, ``check_poolable``
says which sides would do.
"""

from __future__ import annotations

import math
import re

from bench.errors import SuiteError

__all__ = [
    "MAX_SIDE",
    "MAX_VOXELS",
    "Shape",
    "check_poolable",
    "crop",
    "format_shape",
    "pad_to",
    "parse_inplane",
    "parse_shape",
]

Shape = tuple[int, ...]

MAX_SIDE = 65_536
"""The longest side that is read as meant: four times the widest scans there are."""
MAX_VOXELS = 2**36
"""The most voxels a shape may have: one channel of fp32 would fill 256 GiB, more than any card."""

_SIDE_NAMES = ("x", "y", "slices")


def parse_shape(text: str, sides: tuple[int, ...] = (2, 3)) -> Shape:
    """Return the sides of ``text``, such as ``(96, 96, 96)`` for ``"96x96x96"``.

    ``sides`` are the allowed numbers of sides. Raises SuiteError for a side that is not a whole
    number, not positive or above ``MAX_SIDE``, for any other number of sides, and for more than
    ``MAX_VOXELS`` voxels.
    """
    parts = text.split("x")
    for part in parts:
        if not re.fullmatch(r"[+-]?[0-9]+", part):
            raise SuiteError(
                f"side {part!r} of {text!r} is not a whole number; write {_form(sides)}"
            )
    if len(parts) not in sides:
        counts = " or ".join(map(str, sides))
        raise SuiteError(f"{text!r} has {len(parts)} side(s), not {counts}; write {_form(sides)}")
    # Digits beyond any allowed side are refused before int(), which has a limit of its own.
    for part in parts:
        digits = part.lstrip("+-0")
        if part.startswith("-") or not digits:
            raise SuiteError(f"side {part[:12]} of {text[:40]!r} is not positive")
        if len(digits) > len(str(MAX_SIDE)) or int(digits) > MAX_SIDE:
            raise SuiteError(f"side {part[:12]} of {text[:40]!r} is over the limit of {MAX_SIDE}")
    shape = tuple(int(part) for part in parts)
    if math.prod(shape) > MAX_VOXELS:
        raise SuiteError(f"{text!r} has {math.prod(shape)} voxels, over the limit of {MAX_VOXELS}")
    return shape


def parse_inplane(text: str) -> tuple[int, int]:
    """Return the two in-plane sides of ``text``, such as ``(256, 256)`` for ``"256x256"``."""
    x, y = parse_shape(text, sides=(2,))
    return x, y


def format_shape(shape: Shape) -> str:
    """Return ``"96x96x96"`` for ``(96, 96, 96)``."""
    return "x".join(map(str, shape))


def crop(shape: Shape, inplane: tuple[int, int]) -> Shape:
    """Return ``shape`` with x and y limited to ``inplane``; slices stay."""
    return (min(shape[0], inplane[0]), min(shape[1], inplane[1]), *shape[2:])


def pad_to(shape: Shape, divisor: Shape) -> Shape:
    """Return ``shape`` with every side rounded up to a multiple of its axis's ``divisor``."""
    return tuple(-(-side // by) * by for side, by in zip(shape, divisor, strict=True))


def check_poolable(shape: Shape, divisor: Shape, network: str) -> None:
    """Raise SuiteError unless every side is a multiple of its axis's ``divisor``.

    The message names, for every side that is not, the nearest sides below and above that are.
    """
    wrong = [
        f"{name} {side} (use {_would_do(side, by)})"
        for name, side, by in zip(_SIDE_NAMES, shape, divisor, strict=False)
        if side % by
    ]
    if wrong:
        divisors = str(divisor[0]) if len(set(divisor)) == 1 else format_shape(divisor)
        raise SuiteError(
            f"{format_shape(shape)} cannot be pooled by {network}, whose sides are multiples of "
            f"{divisors}: {', '.join(wrong)}; or give the shape pad: true"
        )


def _would_do(side: int, by: int) -> str:
    below = side // by * by
    return f"{below} or {below + by}" if below else str(by)


def _form(sides: tuple[int, ...]) -> str:
    return " or ".join("x".join(["256"] * count) for count in sides)
