"""The card that a step is traced for, where torch's own code on the host asks about it.

Most of a trace is the same on every card. What is not: which kernel attention takes, by the compute
capability, and how many blocks share a reduction, by the number of multiprocessors. The process
that traces is told of one card at a time; until then it is an H100's or H200's.
"""

from __future__ import annotations

import ctypes

from bench.predict.card import DEFAULT_MULTIPROCESSORS, Card

__all__ = ["capability", "multiprocessors", "resident_threads", "trace_for"]

_HOPPER = (9, 0)

# Of the process, not of a thread: autograd runs backward in threads of its own.
_told: list[tuple[tuple[int, int], int]] = [(_HOPPER, DEFAULT_MULTIPROCESSORS)]


def trace_for(card: Card | None = None) -> None:
    """Trace for ``card`` from here on; without one, for what stands in for a card not named.

    Where the fake CUDA device is loaded it is told too. Torch must have been imported: a CUDA build
    of it puts its own answers in place as it loads.
    """
    _told[0] = (
        (_HOPPER, DEFAULT_MULTIPROCESSORS)
        if card is None
        else (card.compute_capability, card.multiprocessors)
    )
    told = getattr(ctypes.CDLL(None), "fake_cuda_card", None)
    if told is not None:
        told(*_told[0][0])


def capability() -> tuple[int, int]:
    """Return the compute capability of the card that is traced for."""
    return _told[0][0]


def resident_threads() -> int:
    """Return how many threads a multiprocessor of that card holds, by its compute capability.

    Source: the table of technical specifications in NVIDIA's CUDA C++ programming guide.
    """
    if capability() == (7, 5):
        return 1024
    small = (8, 6) <= capability() <= (8, 9) or capability() >= (12, 0)
    return 1536 if small else 2048


def multiprocessors() -> int:
    """Return the number of multiprocessors of the card that is traced for."""
    return _told[0][1]
