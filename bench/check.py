"""Whether a run needs more memory than its baseline: case by case, with a verdict for each.

The allocated peak is always gated; reserved, process and time are shown, and gated when asked. A
case that does not fit on either side has no peak to compare: what it needs is compared instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from bench.compare import Comparison, Difference, differences, pair_up, refuse_unlike
from bench.errors import MembenchError, nearest
from bench.explain import Growth
from bench.figures import Figures
from bench.tolerance import Tolerance, parse_tolerance

__all__ = [
    "METRICS",
    "CaseCheck",
    "CheckReport",
    "MetricCheck",
    "Verdict",
    "check",
    "parse_gates",
]

Verdict = Literal[
    "regression",
    "newly_oom",
    "failed",
    "timeout",
    "skipped",
    "vanished",
    "improvement",
    "newly_fits",
    "new",
    "same",
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_ALWAYS_FAIL = ("regression", "newly_oom", "failed", "timeout", "skipped", "vanished")
_IMPROVED = ("improvement", "newly_fits")
METRICS = {  # name in --gate -> field of Figures
    "allocated": "peak_allocated_bytes",
    "reserved": "peak_reserved_bytes",
    "process": "process_bytes",
    "time": "time_s",
}
_NEEDS = "needs"  # stands for the allocated peak where a case does not fit
_DEFAULTS = {"time": "10%"}  # steps scatter; bytes hardly do
_DEFAULT = "1%"


@dataclass(frozen=True, slots=True)
class MetricCheck:
    """One figure before and after: bytes, but ``time`` is in seconds. None: not known."""

    name: str
    before: int | float | None
    after: int | float | None
    tolerance: Tolerance | None  # None: shown, not gated

    @property
    def change(self) -> int | float | None:
        """After less before."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def grew(self) -> bool:
        """Whether it is gated, and above what is allowed."""
        if self.tolerance is None or self.before is None or self.after is None:
            return False
        return self.tolerance.grew(self.before, self.after)

    @property
    def shrank(self) -> bool:
        """Whether it is gated, and better than before by more than the tolerance."""
        if self.tolerance is None or self.before is None or self.after is None:
            return False
        return self.tolerance.shrank(self.before, self.after)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data, with the unit in each name."""
        unit = "s" if self.name == "time" else "bytes"
        return {
            f"before_{unit}": self.before,
            f"after_{unit}": self.after,
            f"change_{unit}": self.change,
            "gated": self.tolerance is not None,
            "tolerance": self.tolerance.text if self.tolerance else None,
            "grew": self.grew,
        }


@dataclass(frozen=True, slots=True)
class CaseCheck:
    """What became of one case. ``fails``: whether it makes the whole check fail."""

    pair: Comparison
    verdict: Verdict
    fails: bool
    metrics: tuple[MetricCheck, ...] = ()

    @property
    def gated(self) -> MetricCheck | None:
        """The first figure that is gated: the allocated peak, or what the case needs."""
        return next((metric for metric in self.metrics if metric.tolerance), None)

    @property
    def growth(self) -> Growth | None:
        """Who holds more at the peak; only where more is needed."""
        needs_more = self.verdict in ("regression", "newly_oom")
        return self.pair.explain() if needs_more else None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        one, growth = self.pair.figures, self.growth
        return {
            "case": one.case,
            "suite": one.origin.suite,
            "card": one.origin.card,
            "evidence": one.origin.evidence,
            "verdict": self.verdict,
            "fails": self.fails,
            "reason": one.reason,
            "metrics": {metric.name: metric.to_dict() for metric in self.metrics},
            "growth": growth.to_dict() if growth else None,
        }


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The verdicts, the worst first, and what differed although it was allowed to."""

    cases: tuple[CaseCheck, ...]
    differences: tuple[Difference, ...]
    gates: Mapping[str, Tolerance]

    @property
    def passed(self) -> bool:
        """Whether no case fails."""
        return not any(case.fails for case in self.cases)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many cases have each verdict that occurs, the worst first."""
        counted = Counter(case.verdict for case in self.cases)
        return {verdict: counted[verdict] for verdict in VERDICTS if counted[verdict]}

    @property
    def unrecorded(self) -> list[CaseCheck]:
        """Cases that fail because the baseline does not say yet how well they do."""
        return [case for case in self.cases if case.fails and case.verdict in (*_IMPROVED, "new")]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "passed": self.passed,
            "tolerances": {name: tolerance.text for name, tolerance in self.gates.items()},
            "counts": self.counts,
            "differences": [asdict(one) for one in self.differences],
            "cases": [case.to_dict() for case in self.cases],
        }


def parse_gates(gates: Iterable[str] = (), tolerances: Iterable[str] = ()) -> dict[str, Tolerance]:
    """Return gated figure -> tolerance, ``allocated`` always being one.

    ``gates``: names, or several with commas. ``tolerances``: ``"1%"`` for the figures in bytes
    that have none of their own, or ``"reserved=3%"``, which gates that figure too.

    Errors: MembenchError for a name that is none, a tolerance that is none, or given twice.
    """
    named = {"allocated", *(_metric(name) for text in gates for name in text.split(","))}
    own: dict[str, Tolerance] = {}
    for text in tolerances:
        name, equals, size = text.rpartition("=")
        key = _metric(name) if equals else ""
        if key in own:
            raise MembenchError(f"--tolerance {text}: {key or 'the tolerance'} is given twice")
        own[key] = parse_tolerance(size)
        if key == "time" and own[key].size_bytes:
            raise MembenchError(f"--tolerance {text}: time is in seconds; write time=10%")
    general = own.pop("", parse_tolerance(_DEFAULT))
    return {
        name: own.get(name) or (parse_tolerance(_DEFAULTS[name]) if name in _DEFAULTS else general)
        for name in METRICS
        if name in named or name in own
    }


def check(
    results: Sequence[Figures],
    baseline: Sequence[Figures],
    gates: Mapping[str, Tolerance] | None = None,
    *,
    allow_different: Iterable[str] = (),
    ratchet: bool = False,
    fail_on_new: bool = False,
) -> CheckReport:
    """Hold ``results`` against ``baseline``; see the module for what is compared.

    A case fails that grew beyond its tolerance, no longer fits, vanished, or gave no figures;
    with ``ratchet`` also one that improved beyond its tolerance or fits now, until the baseline
    says so; with ``fail_on_new`` also one that the baseline does not have.

    Errors: MembenchError when figures were not made alike in what ``allow_different`` does not
    name, and when a gated figure is not known.
    """
    gates = parse_gates() if gates is None else gates
    pairs = pair_up(baseline, results)
    found = differences(pairs)
    refuse_unlike(found, frozenset(allow_different))
    cases = [_check_case(pair, gates, ratchet, fail_on_new) for pair in pairs]
    cases.sort(key=_worst_first)
    return CheckReport(tuple(cases), tuple(found), gates)


def _check_case(
    pair: Comparison, gates: Mapping[str, Tolerance], ratchet: bool, fail_on_new: bool
) -> CaseCheck:
    metrics = tuple(_metrics(pair, gates))
    verdict = _verdict(pair, metrics)
    fails = (
        verdict in _ALWAYS_FAIL
        or (ratchet and verdict in _IMPROVED)
        or (fail_on_new and verdict == "new")
    )
    return CaseCheck(pair, verdict, fails, metrics)


def _verdict(pair: Comparison, metrics: Sequence[MetricCheck]) -> Verdict:
    before, after = pair.before, pair.after
    if after is None:
        return "vanished"
    if after.status != "ok" and after.status != "oom":
        return after.status
    if before is None or before.status not in ("ok", "oom"):
        return "new"
    if before.status != after.status:
        return "newly_oom" if after.status == "oom" else "newly_fits"
    if any(metric.grew for metric in metrics):
        return "regression"
    return "improvement" if any(metric.shrank for metric in metrics) else "same"


def _metrics(pair: Comparison, gates: Mapping[str, Tolerance]) -> Iterable[MetricCheck]:
    """Return the figures of a case; gated ones only where both sides ran to the same end."""
    before, after = pair.before, pair.after
    statuses = (before and before.status, after and after.status)
    for name, field in METRICS.items():
        old, new = getattr(before, field, None), getattr(after, field, None)
        gate = gates.get(name) if statuses == ("ok", "ok") else None
        if gate is not None and (old is None or new is None):
            where = "the baseline" if old is None else "the results"
            raise MembenchError(
                f"{name} is gated, but {pair.figures.title} has none in {where}: "
                "leave it out of --gate, or give figures that have it"
            )
        yield MetricCheck(name, old, new, gate)
    if "oom" in statuses:
        old, new = getattr(before, "needs_bytes", None), getattr(after, "needs_bytes", None)
        yield MetricCheck(
            _NEEDS, old, new, gates["allocated"] if statuses == ("oom", "oom") else None
        )


def _worst_first(case: CaseCheck) -> tuple[int, int]:
    gated = case.gated
    change = gated.change if gated else None
    return VERDICTS.index(case.verdict), -int(change or 0)


def _metric(name: str) -> str:
    name = name.strip()
    if name not in METRICS:
        raise MembenchError(f"{name!r} is no figure that can be gated{nearest(name, METRICS)}")
    return name
