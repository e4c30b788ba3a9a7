"""Which blocks to recompute: the placement of checkpoints with least recomputation under a budget.

The network is a list of ``Block``s in the order in which they run, a chain or a U-Net, with the
bytes that each keeps and what running it again costs. ``place(blocks, budget_bytes)`` cuts the list
into regions: a block that keeps what it needs, or a run of blocks that is recomputed from its
inputs. It returns the ``Placement`` of least cost whose peak is within the budget, found by dynamic
programming, not guessed. ``peak_of(blocks, segments)`` gives the peak of any placement.

What is alive when backward is at block i of a region [p, q), in the model used here:

- the insides of all kept blocks before p;
- results of blocks before p that a block up to i reads, from another region than the one that made
  it: whoever reads a result keeps it, or can make it again within its own region;
- in the region, once it has been recomputed: the insides of its blocks up to i, and the results
  that they hand on to each other (of a kept block, its own insides);
- gradients: the result of every block up to i that a block behind i reads, or the loss;
- ``work_bytes`` of block i.

The network's own input, parameters, their gradients and the optimizer's state are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memsave.errors import OptionError

__all__ = ["Block", "Placement", "Segment", "least_peak", "peak_of", "place", "trade_offs"]

Segment = tuple[int, int]
"""The blocks from the first number up to, without, the second: a region that is recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of the network: what it keeps, what it hands on, what running it again costs."""

    inside_bytes: int  # kept for its backward, without what it reads and without its result
    result_bytes: int
    cost: int  # of running it forward once, in FLOPs or any other unit
    reads: tuple[int, ...] | None = None  # blocks whose results it reads; None: the one before
    work_bytes: int = 0  # alive beside all else while its backward runs

    def __post_init__(self) -> None:
        if min(self.inside_bytes, self.result_bytes, self.cost, self.work_bytes) < 0:
            raise OptionError(f"bytes and cost of a block must be 0 or more, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which regions are recomputed, what that costs, and the peak of backward in bytes."""

    segments: tuple[Segment, ...]
    peak_bytes: int
    cost: int

    @property
    def recomputed(self) -> tuple[int, ...]:
        """The numbers of the blocks that run twice."""
        return tuple(block for start, stop in self.segments for block in range(start, stop))


def place(
    blocks: Sequence[Block], budget_bytes: int, *, longest: int | None = None
) -> Placement | None:
    """Return the placement of least recomputation whose peak is at most ``budget_bytes``.

    None if there is none: ``least_peak`` says what would do.

    Memory, time: the placements of every first part of the network are kept that no other one
        beats in both bytes and cost: a few hundred for tens of blocks of a real network. Bytes and
        costs made up so that no two of their sums agree could double them with each block.
    Exact: no placement of such regions within the budget costs less, in this model of backward.
    Errors: OptionError for a block that reads itself or a later one.

    Args:
        blocks: in the order in which they run.
        budget_bytes: what the peak may be.
        longest: how many blocks a recomputed region may have, 1 where each block is a module
            whose neighbours cannot be run with it; None: any number.
    """
    found = _search(_Network(blocks), longest, budget_bytes, lambda partial: partial.cost)
    best = min(found, key=lambda p: (p.cost, p.peak_bytes, p.segments), default=None)
    return None if best is None else best.placement()


def least_peak(blocks: Sequence[Block], *, longest: int | None = None) -> Placement:
    """Return the placement of the smallest peak, of least cost among those: what is possible."""
    network = _Network(blocks)
    plain_bytes = peak_of(blocks, ())
    found = _search(network, longest, plain_bytes, lambda partial: partial.peak_bytes)
    best = place(blocks, min(partial.peak_bytes for partial in found), longest=longest)
    assert best is not None
    return best


def peak_of(blocks: Sequence[Block], segments: Sequence[Segment]) -> int:
    """Return the peak of backward, in bytes, where these regions are recomputed.

    Raises OptionError for regions that are empty, overlap, are out of order or out of range.
    """
    network = _Network(blocks)
    partial = _Partial()
    position = 0
    for start, stop in (*segments, (len(blocks), len(blocks))):
        if not position <= start <= stop <= len(blocks) or (start == stop != len(blocks)):
            raise OptionError(
                f"regions must be (start, stop) in order, apart and within 0 and {len(blocks)}, "
                f"got {list(segments)}"
            )
        for block in range(position, start):
            partial = network.extend(partial, block, block + 1, True)
        if start < stop:
            partial = network.extend(partial, start, stop, False)
        position = stop
    return partial.peak_bytes


def trade_offs(
    blocks: Sequence[Block], *, longest: int | None = None, most: int = 128
) -> tuple[Placement, ...]:
    """Return what budgets can ask for: least cost first, ever smaller peaks, ``least_peak``'s last.

    The first one recomputes nothing. Each is ``place``'s at a budget of its own peak; where there
    are more than ``most``, those are left out whose peak is next to that of the one before.
    """
    plain_bytes = peak_of(blocks, ())
    least_bytes = least_peak(blocks, longest=longest).peak_bytes
    apart_bytes = max(1, (plain_bytes - least_bytes) // max(1, most - 2))
    found: list[Placement] = []
    allowed_bytes = plain_bytes
    while not found or found[-1].peak_bytes > least_bytes:
        placement = place(blocks, allowed_bytes, longest=longest)
        assert placement is not None  # least_peak's is within every budget that is tried
        found.append(placement)
        allowed_bytes = max(placement.peak_bytes - apart_bytes, least_bytes)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Partial:
    """A placement of the first blocks."""

    held_bytes: int = 0  # by the regions so far: insides, and results that they have read
    peak_bytes: int = 0
    cost: int = 0
    segments: tuple[Segment, ...] = ()
    waiting: frozenset[int] = frozenset()  # results that only blocks still to come hold

    def placement(self) -> Placement:
        return Placement(segments=self.segments, peak_bytes=self.peak_bytes, cost=self.cost)


class _Region(NamedTuple):
    """What a region adds to a placement of the blocks before it."""

    held_bytes: int
    alive_bytes: int  # at most, beside what those before it hold
    cost: int
    waiting: frozenset[int]


class _Network:
    """The blocks with who reads whose result."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)
        self.readers: list[list[int]] = [[] for _ in blocks]
        for i, block in enumerate(blocks):
            reads = ((i - 1,) if i else ()) if block.reads is None else block.reads
            for read in dict.fromkeys(reads):
                if not 0 <= read < i:
                    raise OptionError(f"block {i} can only read blocks before it, got {read}")
                self.readers[read].append(i)
        self.count = len(blocks)
        self.gradients = [self._gradients(i) for i in range(self.count)]
        self._regions: dict[tuple[frozenset[int], int, int, bool], _Region] = {}

    def extend(self, partial: _Partial, start: int, stop: int, kept: bool) -> _Partial:
        """Return ``partial``, of the blocks before ``start``, with this region behind it."""
        region = self._region(partial.waiting, start, stop, kept)
        return _Partial(
            held_bytes=partial.held_bytes + region.held_bytes,
            peak_bytes=max(partial.peak_bytes, partial.held_bytes + region.alive_bytes),
            cost=partial.cost + region.cost,
            segments=partial.segments if kept else (*partial.segments, (start, stop)),
            waiting=region.waiting,
        )

    def _region(self, waiting: frozenset[int], start: int, stop: int, kept: bool) -> _Region:
        key = (waiting, start, stop, kept)
        if key not in self._regions:
            blocks = self.blocks[start:stop]
            read = {j for j in waiting if self._first_reader(j, start) < stop}
            made = {j for j in range(start, stop) if self._first_reader(j, stop) < self.count}
            self._regions[key] = _Region(
                held_bytes=self._bytes(read) + (blocks[0].inside_bytes if kept else 0),
                alive_bytes=self._most_alive(waiting, start, stop),
                cost=0 if kept else sum(block.cost for block in blocks),
                waiting=(waiting - read) | made,
            )
        return self._regions[key]

    def _most_alive(self, waiting: frozenset[int], start: int, stop: int) -> int:
        """Return the most that a region has alive beside what those before it hold."""
        first_read: dict[int, int] = defaultdict(int)
        for j in (*waiting, *range(start, stop)):
            first_read[self._first_reader(j, start)] += self.blocks[j].result_bytes
        most = kept = 0
        for i in range(start, stop):
            kept += self.blocks[i].inside_bytes + first_read[i]
            most = max(most, kept + self.gradients[i] + self.blocks[i].work_bytes)
        return most

    def _gradients(self, i: int) -> int:
        """Return the bytes of the gradients that are there when backward comes to block ``i``."""
        return self._bytes(j for j in range(i + 1) if max(self.readers[j], default=self.count) > i)

    def _first_reader(self, j: int, begin: int) -> int:
        """Return the first block from ``begin`` on that reads result ``j``; the count if none."""
        return next((reader for reader in self.readers[j] if reader >= begin), self.count)

    def _bytes(self, results: Iterable[int]) -> int:
        return sum(self.blocks[j].result_bytes for j in results)


def _search(
    network: _Network, longest: int | None, budget_bytes: int, aim: Callable[[_Partial], int]
) -> list[_Partial]:
    """Return placements of all blocks within the budget, among them one of the smallest ``aim``."""
    partials = [[_Partial()], *([] for _ in range(network.count))]
    for stop in range(1, network.count + 1):
        found = [
            network.extend(partial, start, stop, kept)
            for start in range(max(0, stop - (longest or network.count)), stop)
            for kept in ((True, False) if stop - start == 1 else (False,))
            for partial in partials[start]
        ]
        partials[stop] = _undominated([p for p in found if p.peak_bytes <= budget_bytes], aim)
    return partials[network.count]


def _undominated(partials: list[_Partial], aim: Callable[[_Partial], int]) -> list[_Partial]:
    """Return those that no other one with the same results waiting beats in bytes held and aim."""
    kept: list[_Partial] = []
    least: dict[frozenset[int], int] = {}
    for partial in sorted(partials, key=lambda p: (p.held_bytes, aim(p), p.peak_bytes)):
        if partial.waiting not in least or aim(partial) < least[partial.waiting]:
            least[partial.waiting] = aim(partial)
            kept.append(partial)
    return kept
