"""Checkpoints placed for a card: the least recomputation whose simulated step fits it.

``checkpoint_budget`` computes the placement of least recomputation within a budget of activations.
What a card leaves for those is not known beforehand: the loss, gradients, libraries and the
allocator's fragments take the rest. So budgets are tried, from the list of those that change the
placement, and simulated: by bisection, as if less memory were needed with every block more that is
recomputed, and then among the cheaper ones that are left, since fragments make exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bench.case import Case, TechniqueUse
from bench.plan.combinations import variant_name
from bench.plan.simulator import Simulator
from bench.record import Record

__all__ = ["MOST_TRIES", "place_for_card"]

MOST_TRIES = 8
"""Simulations for one placement, at most, beside those without and with all of its checkpoints."""

_TECHNIQUE = "checkpoint_budget"


def place_for_card(
    cases: Sequence[Case],
    done: Mapping[str, Record],
    simulator: Simulator,
    on_record: Callable[[Record], None] | None = None,
) -> list[tuple[Case, Record]]:
    """Return cases with a budget each, of least recomputation and fitting, with their records.

    One for each of ``cases`` that takes ``checkpoint_budget`` without a budget, its least peak, and
    fits while the same without checkpoints does not. None where the least peak alone fits.
    ``done``: records of ``cases``, by digest.
    """
    found: list[_Search] = []
    for case in cases:
        tight, plain = done.get(case.digest()), done.get(_unplaced(case).digest())
        if not _is_open(case) or tight is None or plain is None:
            continue
        if (plain.status, tight.status) == ("oom", "ok"):
            found.append(_Search(case, plain, tight, simulator.card.capacity_bytes))
    for search, budgets in zip(found, simulator.budgets([s.case for s in found]), strict=True):
        search.budgets = budgets
    while tried := [(s, index) for s in found if (index := s.next()) is not None]:
        records = simulator.records([s.at(index) for s, index in tried], on_record=on_record)
        for (search, index), record in zip(tried, records, strict=True):
            search.note(index, record)
    return [(s.at(s.fits), s.known[s.fits]) for s in found if s.fits < len(s.budgets) - 1]


def _is_open(case: Case) -> bool:
    return TechniqueUse(name=_TECHNIQUE) in case.techniques


def _unplaced(case: Case) -> Case:
    uses = tuple(use for use in case.techniques if use.name != _TECHNIQUE)
    return replace(case, techniques=uses, variant=variant_name(case, uses))


class _Search:
    """The budgets of one case: which is known to fit, and which to try next.

    Budgets get smaller, and recomputation more, with their index. The first one is the case
    without checkpoints, the last one the case with the least peak.
    """

    def __init__(self, case: Case, plain: Record, tight: Record, capacity_bytes: int) -> None:
        self.case, self._plain, self._tight = case, plain, tight
        self._capacity_bytes = capacity_bytes
        self._budgets: tuple[int, ...] = ()
        self.known: dict[int, Record] = {}
        self.fails, self.fits = 0, 0  # the last index that is taken not to fit; the best that fits
        self._halve = False  # whether the last guess cut off less than half

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budgets in bytes; set once they are known."""
        return self._budgets

    @budgets.setter
    def budgets(self, budgets: tuple[int, ...]) -> None:
        self._budgets = budgets
        self.fits = max(0, len(budgets) - 1)
        self.known = {self.fits: self._tight, 0: self._plain}

    def at(self, index: int) -> Case:
        """Return the case with the budget of this index."""
        given = TechniqueUse(name=_TECHNIQUE, options={"budget": self.budgets[index]})
        uses = tuple(given if use.name == _TECHNIQUE else use for use in self.case.techniques)
        return replace(self.case, techniques=uses, variant=variant_name(self.case, uses))

    def next(self) -> int | None:
        """Return the index to simulate next; None when the search is at its end."""
        if len(self.known) - 2 >= MOST_TRIES:
            return None
        if self.fits - self.fails > 1:
            return self._guess()
        untried = [index for index in range(self.fits) if index not in self.known]
        return untried[-1] if untried else None

    def note(self, index: int, record: Record) -> None:
        """Take in what simulating this index gave."""
        self.known[index] = record
        before = self.fits - self.fails
        if record.status == "ok":
            self.fits = min(self.fits, index)
        elif index < self.fits:
            self.fails = max(self.fails, index)
        self._halve = not self._halve and 2 * (self.fits - self.fails) > before

    def _guess(self) -> int:
        """Return an index between the two, where the needs are expected to reach the capacity."""
        over = (self.known[self.fails].needs_bytes or 0) - self._capacity_bytes
        under = self._capacity_bytes - (self.known[self.fits].needs_bytes or 0)
        first, last = self.budgets[self.fails], self.budgets[self.fits]
        if self._halve or over <= 0 or under < 0:
            return (self.fails + self.fits) // 2
        wanted = first - (first - last) * over // (over + under)
        between = range(self.fails + 1, self.fits)
        return next((i for i in between if self.budgets[i] <= wanted), between[-1])
