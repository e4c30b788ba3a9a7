"""Slabs of a volume along its last axis, and what is stored of a volume slab by slab."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memsave.errors import OptionError

__all__ = ["Read", "Slabs", "SlabStore", "cut", "padded"]

Slabs = tuple[tuple[int, int], ...]
"""First slice and the one after the last, of each slab in order."""

Read = Callable[[int, int], Tensor]
"""Gives the slices from the first to before the last of a volume (N, C, A, B, slices)."""


def cut(slices: int, slabs: int) -> Slabs:
    """Cut ``slices`` (even) into slabs of about equal thickness, whole pairs of slices each.

    Raises OptionError for fewer slabs than 1 or more than there are pairs.
    """
    pairs = slices // 2
    if not 1 <= slabs <= pairs:
        raise OptionError(
            f"{slices} slices can be cut into 1 to {pairs} slabs of two slices or more, "
            f"got slabs: {slabs}"
        )
    bounds = [2 * (pairs * i // slabs) for i in range(slabs + 1)]
    return tuple(zip(bounds[:-1], bounds[1:], strict=True))


def padded(read: Read, start: int, stop: int, halo: int, slices: int) -> Tensor:
    """Return slices ``start - halo`` to ``stop + halo``: real neighbours, zeros past the ends."""
    first, last = max(0, start - halo), min(slices, stop + halo)
    values = read(first, last)
    before, after = first - (start - halo), stop + halo - last
    return F.pad(values, (before, after)) if before or after else values


class SlabStore:
    """A volume stored slab by slab, so that each slab's memory can be given back by itself.

    Slabs lie one after the other, each a contiguous tensor (N, C, A, B, thickness).
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, Tensor]] = []

    def append(self, start: int, values: Tensor) -> None:
        """Store the next slab, which begins at slice ``start``."""
        self._pieces.append((start, values))

    def read(self, start: int, stop: int) -> Tensor:
        """Return the slices; a whole slab as it lies, anything else as a copy."""
        parts = []
        for first, values in self._pieces:
            low, high = max(start, first), min(stop, first + values.shape[-1])
            if low < high:
                parts.append(values.narrow(-1, low - first, high - low))
        assert sum(part.shape[-1] for part in parts) == stop - start, "slices were released"
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=-1)

    def release_before(self, slice_: int) -> None:
        """Give back all slices before this one; of a slab cut through, the rest is copied."""
        kept = []
        for first, values in self._pieces:
            beyond = first + values.shape[-1] - slice_
            if beyond <= 0:
                continue
            if first < slice_:
                values = values.narrow(-1, slice_ - first, beyond).clone(  # noqa: PLW2901
                    memory_format=torch.contiguous_format
                )
                first = slice_  # noqa: PLW2901
            kept.append((first, values))
        self._pieces = kept

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(values.nbytes for _, values in self._pieces)
