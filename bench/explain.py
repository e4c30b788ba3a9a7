"""Who holds the bytes at a peak, and who holds more of them than before.

Holders are matched by module, operator and category, never by line: lines move when code above
them changes. The lines are shown, and those of one holder are paired in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, get_args

from bench.record import Holder
from bench.units import format_bytes

__all__ = [
    "AXES",
    "AXIS_TITLES",
    "NO_HOLDERS",
    "Axis",
    "Change",
    "Growth",
    "Share",
    "explain_growth",
    "growth_text",
    "held_by",
    "signed_bytes",
]

Axis = Literal["category", "module", "operator", "line"]
AXES: tuple[Axis, ...] = get_args(Axis)
NO_HOLDERS = (
    "no holders are recorded, so nobody can be named: measured records have none; "
    "predict the same suite with --device predict to see them"
)
AXIS_TITLES: dict[Axis, str] = {
    "category": "by category",
    "module": "by module",
    "operator": "by operator",
    "line": "by source line",
}
_CATEGORIES = {
    "parameter": "parameters",
    "gradient": "gradients",
    "optimizer_state": "optimizer state",
    "activation": "activations",
    "input": "inputs",
    "temporary": "temporaries",
    "workspace": "workspace",
}


@dataclass(frozen=True, slots=True)
class Share:
    """What one module, operator, line or category holds at a peak."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Change:
    """What one module, operator, line or category holds at one peak and at another."""

    name: str
    before_bytes: int
    after_bytes: int

    @property
    def growth_bytes(self) -> int:
        """After less before: below 0 where it shrank."""
        return self.after_bytes - self.before_bytes


@dataclass(frozen=True, slots=True)
class Growth:
    """What changed between two peaks, along each axis: the largest growth first, losses last.

    Bytes are requested ones: the allocator rounds each up, so they add up to a little less than
    an allocated peak. What did not change is left out. ``known``: whether both peaks have holders.
    """

    known: bool
    before_bytes: int
    after_bytes: int
    by_category: tuple[Change, ...] = ()
    by_module: tuple[Change, ...] = ()
    by_operator: tuple[Change, ...] = ()
    by_line: tuple[Change, ...] = ()

    def by(self, axis: Axis) -> tuple[Change, ...]:
        """Return the changes along ``axis``."""
        changes: tuple[Change, ...] = getattr(self, f"by_{axis}")
        return changes

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data, each change with its ``growth_bytes``."""
        return {
            "known": self.known,
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
        } | {
            f"by_{axis}": [
                asdict(change) | {"growth_bytes": change.growth_bytes} for change in self.by(axis)
            ]
            for axis in AXES
        }


def explain_growth(before: Sequence[Holder], after: Sequence[Holder]) -> Growth:
    """Compare two live sets: who holds more at the peak of ``after`` than at that of ``before``.

    Where one of the two is empty nothing can be said of who grew, and ``known`` is False.
    """
    old_bytes, new_bytes = _total(before), _total(after)
    if not before or not after:
        return Growth(False, old_bytes, new_bytes)
    moved = _lines_after(before, after)
    along: dict[str, tuple[Change, ...]] = {}
    for axis in AXES:
        names = moved if axis == "line" else [_name(axis, holder) for holder in before]
        old = _added(zip(names, (holder.bytes for holder in before), strict=True))
        new = _added((_name(axis, holder), holder.bytes) for holder in after)
        along[f"by_{axis}"] = _changes(old, new)
    return Growth(True, old_bytes, new_bytes, **along)


def held_by(holders: Iterable[Holder], axis: Axis) -> list[Share]:
    """Return what each module, operator, line or category holds, largest first."""
    totals = _added((_name(axis, holder), holder.bytes) for holder in holders)
    return sorted(
        (Share(name, size) for name, size in totals.items()), key=lambda s: (-s.bytes, s.name)
    )


def growth_text(growth: Growth, top: int = 5) -> str:
    """Return the explanation as plain lines: along each axis the ``top`` largest that grew.

    What shrank follows in one line, since a peak that moved to another moment loses there what
    it gains elsewhere.
    """
    if not growth.known:
        return f"  {NO_HOLDERS}"
    lines: list[str] = []
    for axis in AXES:
        grew = [change for change in growth.by(axis) if change.growth_bytes > 0]
        shrank = [change for change in reversed(growth.by(axis)) if change.growth_bytes < 0]
        if grew or shrank:
            lines.append(f"  {AXIS_TITLES[axis]}")
        lines += _change_lines(grew, top)
        if shrank:
            first = shrank[0]
            rest = f" and {len(shrank) - 1} more" if len(shrank) > 1 else ""
            lines.append(f"    less: {signed_bytes(first.growth_bytes)}  {first.name}{rest}")
    return "\n".join(lines) if lines else "  the holders at both peaks are the same"


def signed_bytes(size_bytes: int) -> str:
    """Return ``+312 MiB``, ``-1.5 KiB`` or ``0 B``."""
    return f"+{format_bytes(size_bytes)}" if size_bytes > 0 else format_bytes(size_bytes)


def _change_lines(changes: Sequence[Change], top: int) -> list[str]:
    rows = [
        (
            signed_bytes(change.growth_bytes),
            change.name,
            f"({format_bytes(change.before_bytes)} -> {format_bytes(change.after_bytes)})",
        )
        for change in changes[:top]
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [f"    {g.rjust(widths[0])}  {n.ljust(widths[1])}  {t}" for g, n, t in rows]
    if len(changes) > top:
        rest = sum(change.growth_bytes for change in changes[top:])
        lines.append(f"    {signed_bytes(rest)} in {len(changes) - top} more")
    return lines


def _changes(old: dict[str, int], new: dict[str, int]) -> tuple[Change, ...]:
    changes = [
        Change(name, old.get(name, 0), new.get(name, 0))
        for name in old | new
        if old.get(name, 0) != new.get(name, 0)
    ]
    return tuple(sorted(changes, key=lambda change: (-change.growth_bytes, change.name)))


def _added(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = defaultdict(int)
    for name, size in pairs:
        totals[name] += size
    return dict(totals)


def _total(holders: Iterable[Holder]) -> int:
    return sum(holder.bytes for holder in holders)


def _name(axis: Axis, holder: Holder) -> str:
    if axis == "category":
        return _CATEGORIES.get(holder.category, holder.category)
    if axis == "module":
        return holder.module or "(no module)"
    return holder.operator if axis == "operator" else holder.source_line or "(no line)"


def _lines_after(before: Sequence[Holder], after: Sequence[Holder]) -> list[str]:
    """Return for each holder of ``before`` the line at which it stands in ``after``.

    Among the holders of one module, operator and category, as many lines as before are the same
    ones in their order; else those that hold equal bytes are, and the others keep their line.
    """
    old, new = _by_key(before), _by_key(after)
    lines = [_name("line", holder) for holder in before]
    for key, places in old.items():
        now = new.get(key, [])
        if len(places) == len(now):
            pairs = list(zip(places, now, strict=True))
        else:
            sizes = [before[i].bytes for i in places], [after[i].bytes for i in now]
            found = SequenceMatcher(None, *sizes, autojunk=False).get_matching_blocks()
            pairs = [(places[a + k], now[b + k]) for a, b, n in found for k in range(n)]
        for i, j in pairs:
            lines[i] = _name("line", after[j])
    return lines


def _by_key(holders: Sequence[Holder]) -> dict[tuple[str, str, str], list[int]]:
    """Return key -> the places of its holders in the list, in the order of their lines."""
    places: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, holder in enumerate(holders):
        places[(holder.module, holder.operator, holder.category)].append(index)
    for indices in places.values():
        indices.sort(key=lambda index: _place(holders[index].source_line))
    return places


def _place(source_line: str) -> tuple[str, int]:
    file, _, number = source_line.rpartition(":")
    return (file, int(number)) if number.isdecimal() else (source_line, 0)
