"""``membench compare``: who holds more bytes in one run than in another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.cli.console import err, out, user_errors

if TYPE_CHECKING:
    from bench.compare import Comparison, Difference

__all__ = ["compare"]


def compare(
    before: Annotated[
        Path,
        typer.Argument(help="Records (.jsonl), a folder of them, or a baseline.", metavar="A"),
    ],
    after: Annotated[
        Path, typer.Argument(help="The run that is held against A, in the same form.", metavar="B")
    ],
    case: Annotated[
        list[str] | None,
        typer.Option(help="Compare only the cases that match this glob; may be repeated."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Compare only the cases of this suite.")] = None,
    top: Annotated[
        int, typer.Option(min=1, help="How many modules, operators, lines to name.")
    ] = 5,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, nothing else.")
    ] = False,
) -> None:
    """Compare the peaks of two runs case by case, and say who grew. The exit code is 0.

    Runs that were not made alike are compared too; what differs is named first. Two runs of one
    case each are compared whatever the cases are called.
    """
    with user_errors():
        from bench.baseline import read_baseline
        from bench.compare import compare as compare_figures
        from bench.compare import differences
        from bench.figures import select

        old = select(read_baseline(before), case, suite, str(before))
        new = select(read_baseline(after), case, suite, str(after))
        pairs = compare_figures(old, new)
        unlike = differences(pairs)
    pairs.sort(key=lambda pair: -(pair.growth_bytes or 0))
    if json:
        import json as json_module

        cases = [_to_dict(pair) for pair in pairs]
        data = {"differences": [one.to_dict() for one in unlike], "cases": cases}
        print(json_module.dumps(data))
    else:
        _print(pairs, unlike, top)


def _to_dict(pair: Comparison) -> dict[str, Any]:
    growth = pair.explain()
    sides = {"before": pair.before, "after": pair.after}
    return {
        "case": pair.figures.case,
        "status": {name: one.status if one else None for name, one in sides.items()},
        "peak_allocated_bytes": {
            name: one.peak_allocated_bytes if one else None for name, one in sides.items()
        },
        "growth_bytes": pair.growth_bytes,
        "growth": growth.to_dict() if growth else None,
    }


def _print(pairs: Sequence[Comparison], unlike: Sequence[Difference], top: int) -> None:
    from bench.explain import growth_text

    for one in unlike:
        err().print(f"not alike: {one.text}", soft_wrap=True, markup=False)
    same = 0
    for pair in pairs:
        growth = pair.explain()
        if growth is None or growth.known:
            changed = growth is None or any(growth.by_category + growth.by_line + growth.by_module)
        else:
            changed = True
        if not changed and not pair.growth_bytes and pair.before and pair.after:
            same += 1
            continue
        out().print(_heading(pair), style="bold", soft_wrap=True, markup=False)
        if growth is not None:
            out().print(growth_text(growth, top), soft_wrap=True, markup=False)
    if same:
        out().print(f"{same} case{'s' * (same != 1)} the same", soft_wrap=True)


def _heading(pair: Comparison) -> str:
    from bench.explain import signed_bytes
    from bench.units import format_bytes

    before, after = pair.before, pair.after
    if before is None or after is None:
        return f"{pair.figures.title}: only in {'B' if before is None else 'A'}"
    title = after.title if before.case == after.case else f"{before.title} -> {after.title}"
    if (before.status, after.status) != ("ok", "ok"):
        return f"{title}: {before.status} -> {after.status}"
    old, new = before.peak_allocated_bytes, after.peak_allocated_bytes
    if old is None or new is None:
        return f"{title}: no allocated peak recorded"
    share = f" ({(new - old) / old:+.2%})".replace("%", " %") if old else ""
    change = f"{signed_bytes(new - old)}{share}"
    return f"{title}: peak allocated {format_bytes(old)} -> {format_bytes(new)}, {change}"
