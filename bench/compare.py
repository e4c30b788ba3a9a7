"""Which case of one run is which case of another, and what was not alike between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.errors import MembenchError, nearest
from bench.explain import Growth, explain_growth
from bench.figures import ORIGIN_FIELDS, Figures

__all__ = [
    "ALLOWABLE",
    "COMPARED",
    "Comparison",
    "Difference",
    "compare",
    "differences",
    "pair_up",
    "parse_allowed",
]

COMPARED = (*ORIGIN_FIELDS, "definition")
# A prediction is never held against a measurement, nor a case against another case.
ALLOWABLE = tuple(f for f in COMPARED if f not in ("evidence", "schema_version", "definition"))
_CALLED = {
    "capped_to": "emulated card",
    "card_hash": "card data (card_hash)",
    "cudnn": "cuDNN",
    "allocator_settings": "allocator settings",
    "suite_hash": "suite hash",
    "schema_version": "schema version",
    "definition": "definition of the case",
}
# How much it counts that two figures share a field, when one could stand for several.
_LIKENESS = (("evidence", 8), ("card", 4), ("capped_to", 4), ("suite", 2), ("tracer", 1))


@dataclass(frozen=True, slots=True)
class Difference:
    """A field in which figures that are to be compared are not alike."""

    field: str
    before: str
    after: str
    cases: tuple[str, ...]

    @property
    def text(self) -> str:
        """``torch: 2.12.0 before, 2.13.0 now (18 cases, as fcn/baseline/96x96x96/train)``."""
        called = _CALLED.get(self.field, self.field)
        named = f"{len(self.cases)} cases, as " if len(self.cases) > 1 else ""
        return (
            f"{called}: {self.before or 'none'} before, {self.after or 'none'} now "
            f"({named}{self.cases[0]})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A case of two runs; None on the side that does not have it."""

    before: Figures | None
    after: Figures | None

    @property
    def figures(self) -> Figures:
        """Return the newer side that is there."""
        one = self.after or self.before
        assert one is not None
        return one

    @property
    def growth_bytes(self) -> int | None:
        """What the allocated peak gained; None unless both sides ran to their end."""
        if self.before is None or self.after is None:
            return None
        if (self.before.status, self.after.status) != ("ok", "ok"):
            return None
        old, new = self.before.peak_allocated_bytes, self.after.peak_allocated_bytes
        return None if old is None or new is None else new - old

    def explain(self) -> Growth | None:
        """Return who grew; None unless there are two sides."""
        if self.before is None or self.after is None:
            return None
        return explain_growth(self.before.holders, self.after.holders)


def compare(before: Sequence[Figures], after: Sequence[Figures]) -> list[Comparison]:
    """Return every case of both runs, in the order of ``after``, then what only ``before`` has.

    Two runs of one case each are compared whatever the cases are called.
    """
    if len(before) == len(after) == 1:
        return [Comparison(before[0], after[0])]
    return pair_up(before, after)


def pair_up(before: Sequence[Figures], after: Sequence[Figures]) -> list[Comparison]:
    """Pair figures of the same case: the likest where there are several, each used once.

    Alike in evidence first, then in card, suite and tracer; ``differences`` says what is not.
    """
    candidates: dict[str, list[int]] = defaultdict(list)
    for index, one in enumerate(before):
        candidates[one.case].append(index)
    ranked = sorted(
        (-_likeness(before[old], one), new, old)
        for new, one in enumerate(after)
        for old in candidates[one.case]
    )
    partner: dict[int, int] = {}
    taken: set[int] = set()
    for _, new, old in ranked:
        if new not in partner and old not in taken:
            partner[new] = old
            taken.add(old)
    pairs = [
        Comparison(before[partner[new]] if new in partner else None, one)
        for new, one in enumerate(after)
    ]
    return pairs + [Comparison(one, None) for old, one in enumerate(before) if old not in taken]


def differences(pairs: Iterable[Comparison]) -> list[Difference]:
    """Return the fields in which paired figures are not alike, with both values and the cases.

    Only of cases that gave figures on both sides: one that failed is compared with nothing.
    """
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for pair in pairs:
        old, new = pair.before, pair.after
        if old is None or new is None or {old.status, new.status} - {"ok", "oom"}:
            continue
        if old.origin != new.origin:
            for name in ORIGIN_FIELDS:
                values = str(getattr(old.origin, name)), str(getattr(new.origin, name))
                if values[0] != values[1]:
                    found[(name, *values)].append(new.case)
        if old.definition_hash != new.definition_hash:
            found[("definition", old.definition_hash, new.definition_hash)].append(new.case)
    ordered = sorted(found.items(), key=lambda item: COMPARED.index(item[0][0]))
    return [Difference(*key, tuple(cases)) for key, cases in ordered]


def parse_allowed(fields: Iterable[str]) -> frozenset[str]:
    """Return the fields that may differ, from texts as ``"torch"`` or ``"torch,card"``.

    Errors: MembenchError for a field that does not exist, or that must always be alike.
    """
    named = [name.strip() for text in fields for name in text.split(",")]
    for name in named:
        if name not in COMPARED:
            raise MembenchError(
                f"--allow-different {name!r}: no such field{nearest(name, COMPARED)}"
            )
        if name not in ALLOWABLE:
            raise MembenchError(
                f"--allow-different {name}: figures that differ in it cannot be held against "
                f"each other; it can be any of {', '.join(ALLOWABLE)}"
            )
    return frozenset(named)


def refuse_unlike(found: Sequence[Difference], allowed: Collection[str]) -> None:
    """Raise MembenchError naming every difference in a field that is not ``allowed``."""
    wrong = [one for one in found if one.field not in allowed]
    if not wrong:
        return
    shown = "; ".join(one.text for one in wrong[:8])
    more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    could = list(dict.fromkeys(one.field for one in wrong if one.field in ALLOWABLE))
    way_out = f", or accept it with --allow-different {','.join(could)}" if could else ""
    raise MembenchError(
        f"cannot compare unlike with unlike: {shown}{more}. Run again as the baseline was, or "
        f"write a new baseline{way_out}"
    )


def _likeness(old: Figures, new: Figures) -> int:
    return sum(
        weight
        for name, weight in _LIKENESS
        if getattr(old.origin, name) == getattr(new.origin, name)
    )
