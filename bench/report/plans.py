"""The report of stored plans: for each card what makes one volume fit it, all of it predicted.

The README's table of plans holds ``readme_rows`` of the same files.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.plan.stored import StoredPlan
from bench.report.cells import NONE
from bench.report.grids import escaped, markdown_table
from bench.units import format_bytes

__all__ = ["FILE_NAME", "SHOWN", "plans_markdown", "quickest", "readme_rows"]

FILE_NAME = "plans.md"
SHOWN = 6
"""How many proposals of each card are listed; the suite beside each plan runs the same."""

Proposal = Mapping[str, Any]
Kind = Callable[[Proposal], bool]
_HEAD = (
    "*Made by `python -m bench.plan_session` from `results/plans`. Do not edit: delete it and make "
    "it again.*"
)
_LEGEND = (
    "All figures are predicted: no GPU was used.",
    (
        "Each cell: the quickest proposal of its kind that fits, the peak that the caching "
        "allocator reserves, what the process holds with the CUDA context, and the slowdown."
    ),
    (
        "exact: the gradients are those of the same network at the same precision. other "
        "architecture: compact blocks, pocket widths; its slowdown is over that network with "
        "everything kept."
    ),
    (
        "slowdown: of a step, over the same network at the same precision with everything kept; "
        "estimated from FLOPs, bytes moved and the constants in `bench/plan/slowdown.py`."
    ),
)


def quickest(plan: StoredPlan, kind: str) -> Proposal | None:
    """Return the proposal of one kind that fits and is predicted to be quickest, None if none is.

    ``kind``: a key of ``_kinds``. Of two as quick it is the one that stands first in the plan.
    """
    wanted = _kinds(plan)[kind]
    found = [one for one in plan.fitting if wanted(one) and one["slowdown"] is not None]
    return min(found, key=lambda one: float(one["slowdown"]), default=None)


def _kinds(plan: StoredPlan) -> dict[str, Kind]:
    asked = min((one["network_options"] for one in plan.proposals), key=len)

    def same(one: Proposal) -> bool:
        return bool(one["network_options"] == asked)

    return {
        "exact": lambda one: same(one) and one["exact"],
        "exact fp32": lambda one: same(one) and one["exact"] and one["precision"] == "fp32",
        "not exact": lambda one: same(one) and not one["exact"],
        "other architecture": lambda one: not same(one),
    }


def readme_rows(plans: Sequence[StoredPlan]) -> list[str]:
    """Return the rows of the README's table: a card each, three kinds of proposals."""
    kinds = ("exact", "exact fp32", "other architecture")
    return [
        f"| {' | '.join([f'`{plan.card}`', *(_short(quickest(plan, k)) for k in kinds)])} |"
        for plan in plans
    ]


def plans_markdown(plans: Sequence[StoredPlan]) -> str:
    """Return ``plans.md``: a table of all cards, then the best proposals of each."""
    import pandas as pd

    rows = [
        {"card": plan.card} | {k: _cell(quickest(plan, k)) for k in _kinds(plan)} for plan in plans
    ]
    text = [
        f"# What makes {_asked(plans[0])} fit a card, predicted",
        _HEAD,
        markdown_table(pd.DataFrame(rows), left=5),
        "\n".join(f"- {line}" for line in _LEGEND),
    ]
    for plan in plans:
        text += _card_text(plan)
    return "\n\n".join(text) + "\n"


def _asked(plan: StoredPlan) -> str:
    first = plan.proposals[0]
    asked, ran = ("x".join(map(str, first[name])) for name in ("requested_shape", "shape"))
    padded = f" (run as {ran})" if ran != asked else ""
    return escaped(f"{first['network']} at {asked}{padded}")


def _card_text(plan: StoredPlan) -> list[str]:
    import pandas as pd

    made, model = plan.environment, escaped(plan.model)
    room = format_bytes(plan.memory_bytes - plan.context_bytes)
    commit = (made.commit or "unknown")[:10]
    rows = [_row(one) for one in plan.fitting[:SHOWN]]
    count = f"{len(plan.fitting)} of {len(plan.proposals)} combinations fit"
    shown = f"the first {len(rows)}:" if rows else "none is listed."
    text = [
        f"## {plan.card}",
        (
            f"{model}, {format_bytes(plan.memory_bytes)}, {room} of it for the allocator. "
            f"Predicted ({plan.tracer}), torch {made.torch}, membench {made.membench}, "
            f"commit {commit}, {(made.started_at or 'on an unknown day')[:10]}."
        ),
        f"```sh\nmembench {shlex.join(plan.command)}\n```",
        f"{count}, {shown}",
    ]
    return [*text, markdown_table(pd.DataFrame(rows), left=3)] if rows else text


def _row(one: Proposal) -> dict[str, str]:
    return {
        "proposal": f"`{one['variant']}`",
        "precision": one["precision"],
        "exact": "yes" if one["exact"] else "no",
        "peak reserved": format_bytes(one["peak_reserved_bytes"]),
        "process": format_bytes(one["process_bytes"]),
        "headroom": format_bytes(one["headroom_bytes"]),
        "slowdown": _slowdown(one),
    }


def _cell(one: Proposal | None) -> str:
    if one is None:
        return NONE
    process = format_bytes(one["process_bytes"])
    reserved = format_bytes(one["peak_reserved_bytes"])
    return f"`{one['variant']}`<br>{reserved} reserved, {process} of the process, {_slowdown(one)}"


def _short(one: Proposal | None) -> str:
    if one is None:
        return NONE
    return f"`{one['variant']}`, {format_bytes(one['peak_reserved_bytes'])}, {_slowdown(one)}"


def _slowdown(one: Proposal) -> str:
    if one["slowdown"] is None:
        return NONE
    measured = " measured" if one["slowdown_evidence"] == "measured" else ""
    return f"{one['slowdown']:.2f} x{measured}"
