"""What a saving of memory costs in time: each row against its baseline, and the Pareto front.

Time is that of measured steps where both rows have it. Where not, the FLOPs of the step stand for
it: they count what is computed again, and nothing of bytes moved or of faster arithmetic. A row
with neither is left out, and named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from bench.record import Record
from bench.report.rows import Row, Section

__all__ = ["Cost", "Trade", "Tradeoff", "make_tradeoff", "pareto_front"]

Cost = Literal["time", "FLOPs"]

_BLIND = frozenset({"offload", "compress_activations"})  # what they cost, FLOPs do not count


@dataclass(frozen=True, slots=True)
class Trade:
    """A row, its memory and its cost, both over the baseline's: 0.6 is 40 % saved."""

    row: Row
    memory: float
    cost: float

    @property
    def saved(self) -> float:
        """The part of the baseline's memory that is saved; below 0 where it takes more."""
        return 1 - self.memory


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """A section's trades, all of one kind of cost; ``left_out`` names (variant, why) of others."""

    section: Section
    cost: Cost
    trades: tuple[Trade, ...]
    left_out: tuple[tuple[str, str], ...]


def make_tradeoff(section: Section) -> Tradeoff:
    """Return the trades of a section: by measured time where the baseline has one, else FLOPs."""
    baseline = next((row.baseline for row in section.rows if row.baseline), None)
    cost: Cost = "time" if baseline is not None and baseline.step_times_s else "FLOPs"
    trades, left_out = [], []
    for row in section.rows:
        ratio, paid = row.ratio, _cost(row, cost)
        if ratio is None:
            left_out.append((row.record.variant, "no memory to compare"))
        elif paid is None:
            left_out.append((row.record.variant, _why(row.record, cost)))
        else:
            trades.append(Trade(row, ratio.value, paid))
    return Tradeoff(section, cost, tuple(trades), tuple(left_out))


def _cost(row: Row, cost: Cost) -> float | None:
    if row.baseline is None:
        return None
    if cost == "time":
        ours, theirs = _time_s(row.record), _time_s(row.baseline)
    elif _blind(row.record) or _blind(row.baseline):
        return None
    else:
        ours, theirs = row.record.step_flops, row.baseline.step_flops
    return ours / theirs if ours is not None and theirs else None


def _why(record: Record, cost: Cost) -> str:
    if cost == "time":
        return "no step was timed"
    return "moves or packs bytes, which no FLOP counts" if _blind(record) else "no FLOPs counted"


def _blind(record: Record) -> bool:
    return not _BLIND.isdisjoint(record.techniques)


def _time_s(record: Record) -> float | None:
    return median(record.step_times_s) if record.step_times_s else None


def pareto_front(trades: Iterable[Trade]) -> list[Trade]:
    """Return the trades that no other beats, by ascending cost.

    One beats another that takes no less memory at no less cost, unless both are equal.
    """
    ordered: Sequence[Trade] = sorted(trades, key=lambda trade: (trade.cost, trade.memory))
    front: list[Trade] = []
    for trade in ordered:
        best = front[-1] if front else None
        if best is None or trade.memory < best.memory or _alike(trade, best):
            front.append(trade)
    return front


def _alike(one: Trade, other: Trade) -> bool:
    return (one.memory, one.cost) == (other.memory, other.cost)
