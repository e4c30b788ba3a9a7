"""Whether a test's peak is allowed, and why not: by its limit, by the card, by the baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.baseline import write_baseline
from bench.check import CheckReport, check
from bench.errors import MembenchError
from bench.explain import AXES, AXIS_TITLES, NO_HOLDERS, growth_text, held_by
from bench.figures import Figures, Origin
from bench.pytest_plugin.usage import Usage
from bench.record import SCHEMA_VERSION, Holder
from bench.tolerance import Tolerance
from bench.units import format_bytes

__all__ = ["Baseline", "figures_of_test", "held_text", "judge", "update_baseline"]

SUITE = "pytest"
_TOP = 5


@dataclass(frozen=True, slots=True)
class Baseline:
    """The peaks that tests are held to, and how much they may grow."""

    name: str
    figures: tuple[Figures, ...]
    tolerance: Tolerance
    allow_different: frozenset[str] = frozenset()

    def check(self, usage: Usage) -> CheckReport | None:
        """Return the verdict of one test; None where the baseline does not know it.

        A measurement is not held against a prediction: a baseline may have both of a test.

        Errors: MembenchError naming what differs, when the two were not made alike.
        """
        known = [
            one
            for one in self.figures
            if one.case == usage.nodeid and one.origin.evidence == usage.evidence
        ]
        known = [one for one in known if one.origin.card == usage.card] or known
        if not known:
            return None
        gates = {"allocated": self.tolerance}
        return check(
            [figures_of_test(usage)], known[:1], gates, allow_different=self.allow_different
        )


def judge(usage: Usage, baseline: Baseline | None) -> tuple[Usage, str]:
    """Return the usage with the baseline's verdict, and what is wrong: "" for nothing.

    The first line says it; who holds the bytes and what grew follow.
    """
    reading = usage.reading
    full = reading.out_of_memory
    wrong = f"{full} ({usage.said})" if full else usage.over_limit
    text = f"{wrong}\n{_held(usage)}" if wrong else ""
    if baseline is None or full:
        return usage, text
    try:
        report = baseline.check(usage)
    except MembenchError as error:
        refused = f"not compared with {baseline.name}: {error}"
        return dataclasses.replace(usage, compared="unlike"), _both(text, refused)
    if report is None:
        return dataclasses.replace(usage, compared="new"), text
    case = report.cases[0]
    growth_bytes = case.pair.growth_bytes
    usage = dataclasses.replace(usage, compared=case.verdict, growth_bytes=growth_bytes)
    if case.fails or (text and (growth_bytes or 0) > 0):
        text = _both(text, _grown(report, usage, baseline))
    return usage, text


def figures_of_test(usage: Usage) -> Figures:
    """Return a test's usage as a baseline keeps it: its node id is the case."""
    reading = usage.reading
    return Figures(
        case=usage.nodeid,
        origin=Origin(
            suite=SUITE,
            evidence=usage.evidence,
            card=usage.card,
            card_hash=usage.card_hash,
            tracer=usage.tracer or "",
            torch=usage.torch,
            cudnn=usage.cudnn,
            allocator_settings=usage.allocator_settings,
            schema_version=SCHEMA_VERSION,
        ),
        status="ok",
        peak_allocated_bytes=reading.peak_allocated_bytes,
        peak_reserved_bytes=reading.peak_reserved_bytes,
        process_bytes=reading.process_bytes,
        holders=reading.holders,
    )


def update_baseline(
    path: object, old: Sequence[Figures], usages: Iterable[Usage]
) -> tuple[int, int]:
    """Write the peaks of tests that came to their end over those that ``old`` has of them.

    Returns how many were written, and how many of tests that did not run were kept.
    """
    from pathlib import Path

    new = {
        (u.nodeid, u.evidence, u.card): figures_of_test(u)
        for u in usages
        if u.ended and not u.reading.out_of_memory
    }
    kept = [one for one in old if (one.case, one.origin.evidence, one.origin.card) not in new]
    if new:
        write_baseline(Path(str(path)), [*kept, *new.values()], allow_fewer=True)
    return len(new), len(kept)


def held_text(holders: Sequence[Holder], top: int = _TOP) -> str:
    """Return who holds the bytes at a peak, along each axis the ``top`` largest, as plain lines."""
    lines: list[str] = []
    for axis in AXES:
        shares = held_by(holders, axis)
        lines.append(f"  {AXIS_TITLES[axis]}")
        width = max((len(format_bytes(share.bytes)) for share in shares[:top]), default=0)
        lines += [f"    {format_bytes(s.bytes).rjust(width)}  {s.name}" for s in shares[:top]]
        if len(shares) > top:
            rest = sum(share.bytes for share in shares[top:])
            lines.append(f"    {format_bytes(rest)} in {len(shares) - top} more")
    return "\n".join(lines)


def _held(usage: Usage) -> str:
    if not usage.reading.holders:
        return f"  {NO_HOLDERS}"
    peak = format_bytes(usage.reading.peak_allocated_bytes)
    heading = f"who holds the bytes at the allocated peak of {peak}:"
    return f"{heading}\n{held_text(usage.reading.holders)}"


def _grown(report: CheckReport, usage: Usage, baseline: Baseline) -> str:
    case = report.cases[0]
    before = case.pair.before
    assert before is not None  # a test that the baseline does not know is not checked
    assert before.peak_allocated_bytes is not None
    growth = case.pair.growth_bytes or 0
    sizes = [format_bytes(b) for b in (before.peak_allocated_bytes, _peak(usage))]
    headline = (
        f"peak allocated grew by {format_bytes(growth)}, {sizes[0]} -> {sizes[1]}, "
        f"tolerance {baseline.tolerance.text} ({usage.said}; baseline {baseline.name})"
    )
    explained = case.pair.explain()
    return f"{headline}\n{growth_text(explained)}" if explained else headline


def _peak(usage: Usage) -> int:
    return usage.reading.peak_allocated_bytes


def _both(first: str, second: str) -> str:
    return f"{first}\n\n{second}" if first else second
