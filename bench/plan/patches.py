"""Shapes in the order in which they grow: of fixed proportions, or as nnU-Net makes patches.

The rule for patches is that of nnU-Net's planner (Isensee et al., Nature Methods 2021, doi
10.1038/s41592-020-01008-z): start at the median shape of the data, and as long as it is too large
take one step off the axis that is the largest in relation to the median.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from bench.shapes import Shape, pad_to

__all__ = ["in_proportion", "patches"]


def patches(largest: Shape, median: Shape, divisor: Shape) -> tuple[Shape, ...]:
    """Return the patches from one step an axis up to ``largest``, the smallest first.

    Each has one step, the axis's divisor, more on one axis than the one before. ``largest`` must
    be multiples of ``divisor``.
    """
    patch, found = list(largest), [largest]
    axes = range(len(largest))
    while longer := [axis for axis in axes if patch[axis] > divisor[axis]]:
        # Of equal relations the longest side, then the later axis: any order would do, one must.
        axis = max(longer, key=lambda a: (Fraction(patch[a], median[a]), patch[a], a))
        patch[axis] -= divisor[axis]
        found.append(tuple(patch))
    return tuple(reversed(found))


def in_proportion(sides: Shape, divisor: Shape) -> Callable[[int], Shape]:
    """Return shapes with the proportions of ``sides``, each side rounded up to its divisor.

    A step lengthens the longest side by its divisor, and the others by their share of that.
    """
    longest = max(range(len(sides)), key=lambda axis: sides[axis])

    def grow(steps: int) -> Shape:
        length = steps * divisor[longest]
        return pad_to(tuple(-(-side * length // sides[longest]) for side in sides), divisor)

    return grow
