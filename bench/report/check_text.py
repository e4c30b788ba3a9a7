"""What a check says, as a person reads it: the words of each case, and a markdown summary."""

from __future__ import annotations

from collections.abc import Sequence

from bench.check import CaseCheck, CheckReport, MetricCheck
from bench.explain import growth_text, signed_bytes
from bench.units import format_bytes

__all__ = ["COLUMNS", "case_cells", "case_heading", "check_summary", "counts_text", "gates_text"]

COLUMNS = ("verdict", "case", "allocated", "change", "reserved", "process", "time")
VERDICT_TEXTS = {
    "regression": "regression",
    "newly_oom": "newly out of memory",
    "failed": "failed",
    "timeout": "timed out",
    "skipped": "skipped",
    "vanished": "vanished",
    "improvement": "improvement",
    "newly_fits": "newly fits",
    "new": "new",
    "same": "within tolerance",
}
_NONE = "-"
_EXPLAINED = 5  # the worst; the others are one `membench compare` away
_LISTED = 500  # GitHub refuses a summary above 1 MiB


def counts_text(report: CheckReport) -> str:
    """Return ``35 cases: 1 regression, 34 within tolerance``."""
    counted = [f"{count} {VERDICT_TEXTS[verdict]}" for verdict, count in report.counts.items()]
    return f"{len(report.cases)} case{'s' * (len(report.cases) != 1)}: {', '.join(counted)}"


def gates_text(report: CheckReport) -> str:
    """Return ``tolerance: allocated 1 %, reserved 3 %``."""
    return "tolerance: " + ", ".join(f"{name} {t.text}" for name, t in report.gates.items())


def case_cells(case: CaseCheck) -> dict[str, str]:
    """Return what each column says of a case; of one that does not fit, what it needs."""
    by_name = {metric.name: metric for metric in case.metrics}
    main = by_name.get("needs") or by_name["allocated"]
    figures = case.pair.figures
    told = f": {figures.reason}" if case.verdict in ("failed", "timeout", "skipped") else ""
    return {
        "verdict": VERDICT_TEXTS[case.verdict] + told,
        "case": figures.title,
        "allocated": ("needs " if main.name == "needs" else "") + _both(main),
        "change": _change(main),
        "reserved": _both(by_name["reserved"]),
        "process": _both(by_name["process"]),
        "time": _both(by_name["time"]),
    }


def case_heading(case: CaseCheck) -> str:
    """Return the case and what makes it fail: each figure before and after, and its tolerance."""
    cells = case_cells(case)
    grew = [
        f"{metric.name} {_both(metric)}, {_change(metric)}, tolerance {metric.tolerance.text}"
        for metric in case.metrics
        if metric.grew and metric.tolerance
    ]
    told = "; ".join(grew) or f"{cells['allocated']}, {cells['change']}"
    return f"{cells['verdict']}: {cells['case']}: {told}"


def explained(report: CheckReport) -> tuple[list[CaseCheck], int]:
    """Return the cases whose growth is worth telling, and how many more there are."""
    grown = [case for case in report.cases if case.growth is not None]
    return grown[:_EXPLAINED], max(0, len(grown) - _EXPLAINED)


def check_summary(report: CheckReport, command: str) -> str:
    """Return the check as markdown for a pull request: verdict, what changed, and why.

    ``command`` records the results as the new baseline.
    """
    notable = [case for case in report.cases if case.verdict != "same"]
    same = [case for case in report.cases if case.verdict == "same"]
    parts = [
        f"## Peak GPU memory: {'no regression' if report.passed else 'the check failed'}",
        f"{counts_text(report)}; {gates_text(report)}. {_made(report)}",
    ]
    parts += [f"Compared although not alike: {one.text}" for one in report.differences]
    if notable:
        parts.append(_table(notable))
    told, more = explained(report)
    for case in told:
        growth = case.growth
        assert growth is not None
        parts += [f"### {_escaped(case_heading(case))}", f"```text\n{growth_text(growth)}\n```"]
    if more:
        parts.append(f"{more} more grew: `membench compare` explains each.")
    if report.unrecorded:
        parts.append(f"To record what is better or new: `{command}`")
    if same:
        folded = _table(same)
        parts.append(
            f"<details><summary>within tolerance: {len(same)}</summary>\n\n{folded}\n\n</details>"
        )
    return "\n\n".join(parts) + "\n"


def _made(report: CheckReport) -> str:
    """Say what the figures are: their evidence, cards and torch."""
    origins = dict.fromkeys(case.pair.figures.origin for case in report.cases)
    made = dict.fromkeys(
        f"{o.evidence}{f' ({o.tracer})' if o.tracer else ''} for {o.card or 'an unknown card'}"
        f"{f', torch {o.torch}' if o.torch else ''}"
        for o in origins
    )
    return "Figures: " + "; ".join(made) + "."


def _table(cases: Sequence[CaseCheck]) -> str:
    from tabulate import tabulate

    shown = [case_cells(case) for case in cases[:_LISTED]]
    columns = [c for c in COLUMNS if c in COLUMNS[:4] or any(row[c] != _NONE for row in shown)]
    rows = [[_escaped(row[column]) for column in columns] for row in shown]
    text = str(tabulate(rows, columns, tablefmt="github", disable_numparse=True))
    more = len(cases) - len(shown)
    return f"{text}\n\nand {more} more" if more else text


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _both(metric: MetricCheck) -> str:
    """Return ``2.9 GiB -> 3 GiB``, one figure where both are the same or one is not known."""
    old, new = (_figure(metric.name, value) for value in (metric.before, metric.after))
    if metric.before is None or metric.after is None:
        return next((text for text in (new, old) if text != _NONE), _NONE)
    return new if metric.before == metric.after else f"{old} -> {new}"


def _figure(name: str, value: int | float | None) -> str:
    if value is None:
        return _NONE
    return f"{value * 1e3:.1f} ms" if name == "time" else format_bytes(int(value))


def _change(metric: MetricCheck) -> str:
    """Return ``+108 MiB (+3.65 %)``."""
    if metric.change is None or metric.before is None:
        return _NONE
    if not metric.change:
        return "none"
    share = f" ({metric.change / metric.before:+.2%})".replace("%", " %") if metric.before else ""
    if metric.name == "time":
        return f"{metric.change * 1e3:+.1f} ms{share}"
    return signed_bytes(int(metric.change)) + share
