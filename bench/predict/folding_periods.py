"""Where a longer trace repeats what a shorter one holds: found, and repeated further.

Two traces of the same loop, one with a period more than the other, differ by stretches of tokens
that only the longer one has: one stretch for each loop that ran longer (the forward, the backward,
the release of a list). Each must repeat what stands right before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.predict.folding_tokens import Tokens

__all__ = ["Insertion", "insertions", "lengthen"]

_Array = npt.NDArray[np.int64]
_MOST_LOOPS = 1000  # stretches in one trace; the search gives up beyond
_MOST_CHOICES = 8  # lengths of a stretch that are tried further


@dataclass(frozen=True, slots=True)
class Insertion:
    """``length`` tokens that the longer trace has more, after ``position`` of the shorter one's."""

    position: int
    length: int


def insertions(short: Tokens, long: Tokens) -> list[Insertion] | None:
    """Return what makes ``long`` of ``short``: stretches that repeat the tokens before them.

    None if they do not differ so. The last place is given where several would do.
    """
    a, b = np.array(short.numbers, np.int64), np.array(long.numbers, np.int64)
    if len(a) > len(b):
        return None
    return _search(a, b)


def _search(a: _Array, b: _Array) -> list[Insertion] | None:
    """Go along both; at each difference try the lengths, the most promising first."""
    # Each entry: a choice not yet tried, as (position in a, insertions so far).
    pending: list[tuple[int, list[Insertion]]] = [(0, [])]
    for _ in range(_MOST_LOOPS):
        if not pending:
            return None
        begin, found = pending.pop()
        shift = sum(insertion.length for insertion in found)
        position = begin + _common(a[begin:], b[begin + shift :])
        budget = len(b) - len(a) - shift
        if position == len(a) and not budget:
            return found
        lengths = _lengths(a, b[shift:], begin, position, budget)
        pending += [(position, [*found, Insertion(position, p)]) for p in lengths]
    return None


def _lengths(a: _Array, b: _Array, begin: int, position: int, budget: int) -> list[int]:
    """Return the lengths that an insertion at ``position`` may have, the most promising last.

    It repeats what ``a`` has from ``begin`` on, and the two go on alike after it.
    """
    most = min(budget, position - begin)
    if position == len(a):
        lengths = [budget] if 0 < budget <= most else []
    else:
        after = b[position + 1 : position + most + 1]
        lengths = (np.nonzero(after == a[position])[0] + 1).tolist()
    repeating = [
        p for p in lengths if np.array_equal(a[position - p : position], _at(b, p, position))
    ]
    alike = {p: _common(a[position:], b[position + p :]) for p in repeating[:_MOST_CHOICES]}
    return sorted(alike, key=lambda p: (alike[p], -p))


def _at(b: _Array, length: int, position: int) -> _Array:
    return b[position : position + length]


def _common(a: _Array, b: _Array) -> int:
    """Return how many tokens two sequences begin with alike."""
    shorter = min(len(a), len(b))
    differences = np.nonzero(a[:shorter] != b[:shorter])[0]
    return int(differences[0]) if len(differences) else shorter


def lengthen(short: Tokens, long: Tokens, found: list[Insertion], periods: int) -> Tokens:
    """Return the tokens of a trace with ``periods`` periods more than ``short``; 1 gives ``long``.

    Bytes grow in proportion to the periods, as they do from ``short`` to ``long``; what is
    repeated has the bytes of what it repeats.
    """
    grown, shift, begin = Tokens([], []), 0, 0
    ends = [*found, Insertion(len(short.numbers), 0)]
    for insertion in ends:
        end, length = insertion.position, insertion.length
        grown.numbers.extend(short.numbers[begin:end])
        before = short.bytes[begin:end]
        after = long.bytes[begin + shift : end + shift]
        grown.bytes.extend(
            size + periods * (longer - size) for size, longer in zip(before, after, strict=True)
        )
        if length:
            grown.numbers.extend(grown.numbers[-length:] * periods)
            grown.bytes.extend(grown.bytes[-length:] * periods)
        begin, shift = end, shift + length
    return grown
