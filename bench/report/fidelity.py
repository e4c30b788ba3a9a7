"""The error of predictions as a table: on the terminal, and as ``reports/fidelity.md``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from bench.fidelity import CAUSES, MARGIN, QUANTITIES, Compared, Fidelity, Quantity, spread
from bench.record import Record
from bench.units import format_bytes

__all__ = [
    "cause_rows",
    "differing_lines",
    "fidelity_markdown",
    "fraction_text",
    "groups",
    "summary_rows",
    "worst_rows",
]

_WORST = 10
_GOALS: dict[str, dict[Quantity, float]] = {
    "calibrated": {"allocated": 0.01, "reserved": 0.03},
    "held out": {"allocated": 0.02, "reserved": 0.05},
}
_SUMMARY = (
    *("shapes", "bytes", "cases", "median error", "lowest", "highest"),
    *("under-estimated", f"by more than {MARGIN * 100:.0f} %", "goal"),
)
Rows = list[dict[str, str]]


def groups(compared: Iterable[Compared]) -> dict[str, list[Compared]]:
    """Return the cases that calibration saw, and those that it did not; empty groups left out."""
    both: dict[str, list[Compared]] = {"calibrated": [], "held out": []}
    for one in compared:
        both["held out" if one.heldout else "calibrated"].append(one)
    return {name: cases for name, cases in both.items() if cases}


def fraction_text(value: float | None) -> str:
    """Return ``+1.3 %``, a dash for None."""
    return "-" if value is None else f"{value:+.1%}".replace("%", " %")


def summary_rows(compared: Iterable[Compared]) -> Rows:
    """Return a row for each group and quantity."""
    rows: Rows = []
    for name, cases in groups(compared).items():
        for quantity in QUANTITIES:
            found = spread(cases, quantity)
            if found is None:
                continue
            texts = (
                *(name, quantity, str(found.cases), f"{found.median_size:.1%}"),
                *(fraction_text(found.lowest), fraction_text(found.highest)),
                *(f"{found.under:.0%}", f"{found.under_margin:.0%}"),
                _goal_text(name, quantity, max(-found.lowest, found.highest)),
            )
            rows.append(dict(zip(_SUMMARY, (t.replace("%", " %") for t in texts), strict=True)))
            rows[-1]["lowest"], rows[-1]["highest"] = texts[4], texts[5]
    return rows


def _goal_text(group: str, quantity: Quantity, largest: float) -> str:
    goal = _GOALS[group].get(quantity)
    if goal is None:
        return "-"
    return f"{goal:.0%}, {'met' if largest <= goal else f'missed by {largest - goal:.2%}'}"


def cause_rows(compared: Iterable[Compared]) -> Rows:
    """Return for each group the median and the widest difference by cause, in bytes."""
    rows: Rows = []
    for name, cases in groups(compared).items():
        for cause in CAUSES:
            known = [v for one in cases if (v := getattr(one.causes(), cause)) is not None]
            if known:
                rows.append(
                    {
                        "shapes": name,
                        "cause": cause,
                        "cases": str(len(known)),
                        "median": _signed(round(statistics.median(known))),
                        "lowest": _signed(min(known)),
                        "highest": _signed(max(known)),
                    }
                )
    return rows


def _signed(size_bytes: int) -> str:
    return ("+" if size_bytes > 0 else "") + format_bytes(size_bytes)


def worst_rows(compared: Iterable[Compared], count: int = _WORST) -> Rows:
    """Return the cases of the largest error of any quantity, worst first."""
    ranked = sorted(compared, key=lambda one: -_largest(one))[:count]
    return [
        {
            "case": one.measured.case,
            "shapes": "held out" if one.heldout else "calibrated",
            **{quantity: fraction_text(one.error(quantity)) for quantity in QUANTITIES},
            "allocated, measured": _size(one.measured.peak_allocated_bytes),
            "process, measured": _size(one.measured.process_bytes),
            "remarks": "; ".join(one.remarks) or "-",
        }
        for one in ranked
    ]


def _largest(one: Compared) -> float:
    return max((abs(e) for q in QUANTITIES if (e := one.error(q)) is not None), default=0.0)


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_bytes(size_bytes)


def differing_lines(fidelity: Fidelity) -> list[str]:
    """Return a line for each case whose verdicts differ, and each that was not predicted."""
    lines = [
        f"{measured.case}: measured {_verdict(measured)}, predicted {_verdict(predicted)}"
        for measured, predicted in fidelity.differing
    ]
    return lines + [f"{case}: not compared: {why}" for case, why in fidelity.not_predicted]


def _verdict(record: Record) -> str:
    if record.status == "ok":
        return f"ok ({_size(record.process_bytes)})"
    return f"{record.status} ({record.reason})"


def fidelity_markdown(fidelity: Fidelity) -> str:
    """Return the whole report as markdown."""
    compared = fidelity.compared
    text = [
        "# Fidelity: predicted against measured",
        "*Made by `membench fidelity` from measured records. Do not edit: make it again.*",
        _made_with(compared),
        "Errors are predicted over measured, less 1. Held out: calibration never saw the case's "
        f"network or one of its shapes. The stated margin is {MARGIN:.0%}.".replace("%", " %"),
        _table(summary_rows(compared), 2) or "No case is `ok` on both sides.",
    ]
    for title, rows, left in (
        ("Differences by cause", cause_rows(compared), 2),
        ("Worst cases", worst_rows(compared), 2),
    ):
        if rows:
            text += [f"## {title}", _table(rows, left)]
    if fidelity.agreed_oom:
        cases = ", ".join(f"`{case}`" for case in fidelity.agreed_oom)
        text += ["## Out of memory on both sides", cases]
    if lines := differing_lines(fidelity):
        text += ["## Not the same verdict, or not compared", "\n".join(f"- {x}" for x in lines)]
    return "\n\n".join(text) + "\n"


def _table(rows: Rows, left: int) -> str:
    if not rows:
        return ""
    import pandas as pd

    from bench.report.grids import escaped, markdown_table

    return markdown_table(
        pd.DataFrame([{k: escaped(v) for k, v in row.items()} for row in rows]), left
    )


def _made_with(compared: Sequence[Compared]) -> str:
    """Name cards and versions of both sides."""
    lines = []
    for side in ("measured", "predicted"):
        found = {_software(getattr(one, side), side == "measured"): None for one in compared}
        lines += [f"- {side}: {text}" for text in found]
    return "\n".join(lines) or "Nothing was compared."


def _software(record: Record, measured: bool) -> str:
    env = record.environment
    card = f"{record.card}, capped to {record.capped_to}" if record.capped_to else str(record.card)
    parts = [card, f"torch {env.torch}"]
    if measured:
        parts += [f"cuDNN {env.cudnn}", f"driver {env.driver}"]
    else:
        parts.append(f"tracer {record.tracer}")
    return ", ".join(parts)
