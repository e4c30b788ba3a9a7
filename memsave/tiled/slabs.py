"""Slabs of a volume along its last axis, and what is stored of a volume slab by slab."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from memsave.errors import OptionError

__all__ = ["Arena", "Read", "SlabStore", "Slabs", "cut", "padded"]

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
    return tuple(itertools.pairwise(bounds))


def padded(read: Read, start: int, stop: int, halo: int, slices: int) -> Tensor:
    """Return slices ``start - halo`` to ``stop + halo``: real neighbours, zeros past the ends."""
    first, last = max(0, start - halo), min(slices, stop + halo)
    values = read(first, last)
    before, after = first - (start - halo), stop + halo - last
    return F.pad(values, (before, after)) if before or after else values


class Arena:
    """Equal blocks of one piece of memory, each for a slab of some channels.

    Slabs come and go between temporaries of about their size. Taken one by one from the caching
    allocator, each would split a block that a temporary left, and leave a hole behind it.

    Memory: what ``grow`` was told, ``blocks * channels * elements of a channel`` of the type of
        ``like``, until the arena is dropped; blocks past those are made one by one.
    """

    def __init__(self, channels: int, slab_shape: tuple[int, ...], like: Tensor) -> None:
        self.channels = channels
        self.blocks = 0
        self._elements = channels * math.prod(slab_shape)
        self._like = like.new_empty(0)
        self._free: list[Tensor] = []

    def grow(self, blocks: int) -> None:
        """Have at least so many blocks in all; the new ones are one piece of memory."""
        if blocks > self.blocks:
            whole = self._like.new_empty((blocks - self.blocks) * self._elements)
            self._free += torch.split(whole, self._elements)
            self.blocks = blocks

    def take(self) -> Tensor:
        """Return a flat block."""
        return self._free.pop() if self._free else self._like.new_empty(self._elements)

    def give(self, block: Tensor) -> None:
        """Take a block back."""
        self._free.append(block)


@dataclass(slots=True)
class _Piece:
    start: int
    parts: list[Tensor]  # channels one after the other, each contiguous
    blocks: list[Tensor] = field(default_factory=list)  # of the arena

    @property
    def stop(self) -> int:
        return self.start + self.parts[0].shape[-1]

    def read(self, start: int, stop: int) -> Tensor:
        parts = [p.narrow(-1, start - self.start, stop - start) for p in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class SlabStore:
    """A volume stored slab by slab, so that each slab's memory can be given back by itself.

    Slabs lie one after the other. In an arena they are copied into its blocks, some channels in
    each; without one the tensors themselves are kept.
    """

    def __init__(self, arena: Arena | None = None) -> None:
        self._arena = arena
        self._pieces: list[_Piece] = []

    def append(self, start: int, values: Tensor) -> None:
        """Store the next slab, which begins at slice ``start``."""
        if self._arena is None:
            self._pieces.append(_Piece(start, [values.contiguous()]))
            return
        piece = _Piece(start, [])
        for part in torch.split(values, self._arena.channels, dim=1):
            block = self._arena.take()
            stored = block[: part.numel()].view(part.shape)
            stored.copy_(part)
            piece.blocks.append(block)
            piece.parts.append(stored)
        self._pieces.append(piece)

    def read(self, start: int, stop: int) -> Tensor:
        """Return the slices, contiguous: the stored tensor itself, or a copy."""
        found = [
            piece.read(max(start, piece.start), min(stop, piece.stop))
            for piece in self._pieces
            if piece.start < stop and start < piece.stop
        ]
        assert sum(part.shape[-1] for part in found) == stop - start, "slices were released"
        return found[0].contiguous() if len(found) == 1 else torch.cat(found, dim=-1)

    def write(self, start: int, values: Tensor) -> None:
        """Overwrite a whole stored slab."""
        (piece,) = (p for p in self._pieces if p.start == start)
        first = 0
        for part in piece.parts:
            part.copy_(values.narrow(1, first, part.shape[1]))
            first += part.shape[1]

    def release_before(self, slice_: int) -> None:
        """Give back all slices before this one; of a slab cut through, the rest is copied."""
        kept = []
        for piece in self._pieces:
            if piece.start < slice_:
                rest = [piece.read(slice_, piece.stop).clone()] if slice_ < piece.stop else []
                self._give(piece)
                kept += [_Piece(slice_, rest)] if rest else []
            else:
                kept.append(piece)
        self._pieces = kept

    def clear(self) -> None:
        """Give everything back."""
        for piece in self._pieces:
            self._give(piece)
        self._pieces = []

    def _give(self, piece: _Piece) -> None:
        if self._arena is not None:
            for block in piece.blocks:
                self._arena.give(block)
