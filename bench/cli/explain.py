"""``membench explain``: who holds the bytes at a case's peak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bench.cli.console import out, user_errors
from bench.errors import MembenchError

if TYPE_CHECKING:
    from bench.explain import Axis
    from bench.figures import Figures

__all__ = ["explain"]

_LISTED = 20


def explain(
    results: Annotated[
        Path, typer.Argument(help="Records (.jsonl), a folder of them, or a baseline.")
    ],
    case: Annotated[str, typer.Argument(help="A case, or a glob that one case matches.")],
    by: Annotated[
        Literal["category", "module", "operator", "line"] | None,
        typer.Option(help="Show only this breakdown, in place of all four."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many rows of each breakdown.")] = 10,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, nothing else.")
    ] = False,
) -> None:
    """Say who holds the bytes at a case's peak: by category, module, operator and source line."""
    with user_errors():
        from bench.baseline import read_baseline
        from bench.explain import AXES

        one = _find(read_baseline(results), case, results)
        axes: Sequence[Axis] = (by,) if by else AXES
        if json:
            import json as json_module

            print(json_module.dumps(_to_dict(one, axes, top)))
        else:
            _print(one, axes, top)


def _find(figures: Sequence[Figures], case: str, results: Path) -> Figures:
    """Return the one case that is named; raise MembenchError listing them when it is not one."""
    from bench.figures import select

    exact = [one for one in figures if one.case == case]
    found = exact or select(figures, case, None, str(results))
    if len(found) > 1:
        listed = ", ".join(one.title for one in found[:_LISTED])
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise MembenchError(f"{case!r} is {len(found)} cases, name one: {listed}{more}")
    return found[0]


def _to_dict(one: Figures, axes: Sequence[Axis], top: int) -> dict[str, Any]:
    from bench.explain import held_by

    shares = {
        f"by_{axis}": [
            {"name": share.name, "bytes": share.bytes} for share in held_by(one.holders, axis)[:top]
        ]
        for axis in axes
    }
    return {
        "case": one.case,
        "card": one.origin.card,
        "evidence": one.origin.evidence,
        "status": one.status,
        "peak_allocated_bytes": one.peak_allocated_bytes,
        "held_bytes": sum(holder.bytes for holder in one.holders),
        **shares,
    }


def _print(one: Figures, axes: Sequence[Axis], top: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    from bench.explain import AXIS_TITLES, NO_HOLDERS, held_by
    from bench.units import format_bytes

    console = out()
    console.print(_heading(one), style="bold", soft_wrap=True, markup=False)
    if not one.holders:
        console.print(NO_HOLDERS, soft_wrap=True)
        return
    total = sum(holder.bytes for holder in one.holders)
    for axis in axes:
        shares = held_by(one.holders, axis)
        console.print(f"\n{AXIS_TITLES[axis]}", style="bold cyan")
        table = Table(box=None, show_header=False, pad_edge=False)
        for justify in ("right", "right", "left"):
            table.add_column(justify=justify, overflow="fold")
        for share in shares[:top]:
            part = f"{share.bytes / total:.1%}".replace("%", " %")
            table.add_row(format_bytes(share.bytes), part, escape(share.name))
        if len(shares) > top:
            rest = sum(share.bytes for share in shares[top:])
            table.add_row(
                format_bytes(rest),
                f"{rest / total:.1%}".replace("%", " %"),
                f"in {len(shares) - top} more",
                style="dim",
            )
        console.print(table)


def _heading(one: Figures) -> str:
    from bench.units import format_bytes

    held = format_bytes(sum(holder.bytes for holder in one.holders))
    peak = one.peak_allocated_bytes
    allocated = format_bytes(peak) if peak is not None else "not known"
    cut = ", which ended before its peak for want of memory" if one.status == "oom" else ""
    named = f"; tensors and workspaces asked for {held}" if one.holders else ""
    return f"{one.title}: peak allocated {allocated}{cut}{named}"
