"""``membench check``: whether a run needs more memory than its baseline, for CI."""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import err, out, user_errors
from bench.errors import MembenchError

if TYPE_CHECKING:
    from bench.check import CheckReport

__all__ = ["check"]

_ROWS = 100  # beyond, cases within tolerance are only counted


def check(
    results: Annotated[
        Path,
        typer.Argument(help="Records (.jsonl) of membench run, or a folder.", show_default=False),
    ],
    baseline: Annotated[
        Path,
        typer.Option(
            help="What membench baseline wrote, a folder of it, or records.", show_default=False
        ),
    ],
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            help="How much peak bytes may grow: 1%, 5MiB or 0; reserved=3% gates that figure "
            "with a tolerance of its own. May be repeated. By default 1%, and time=10%.",
            show_default=False,
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="Figures to gate beside allocated: reserved, process, time. May be repeated, "
            "or take several with commas.",
            show_default=False,
        ),
    ] = None,
    allow_different: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare although this differs: card, capped_to, tracer, torch, cudnn, "
            "allocator_settings, suite, suite_hash, card_hash. May be repeated.",
            show_default=False,
        ),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Check only the cases that match this glob; may be repeated."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Check only the cases of this suite.")] = None,
    ratchet: Annotated[
        bool,
        typer.Option("--ratchet", help="Fail on an improvement that the baseline does not have."),
    ] = False,
    fail_on_new: Annotated[
        bool, typer.Option("--fail-on-new", help="Fail on a case that the baseline does not have.")
    ] = False,
    summary: Annotated[
        Path | None, typer.Option(help="Write a markdown summary to this file.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, nothing else.")
    ] = False,
) -> None:
    """Compare peak allocated bytes with a baseline, case by case; exit code 1 if one regressed.

    Regressed: grew beyond the tolerance, newly out of memory, vanished, failed or timed out. New
    cases and improvements are named and pass, unless asked otherwise. Exit code 2: misuse, and
    figures that were not made alike. A summary is appended to $GITHUB_STEP_SUMMARY where it is set.
    """
    with user_errors(), _collector_at_rest():
        from bench.baseline import read_baseline
        from bench.check import check as check_figures
        from bench.check import parse_gates
        from bench.compare import parse_allowed
        from bench.figures import read_results_figures, select
        from bench.report.check_text import check_summary

        gates = parse_gates(gate or (), tolerance or ())
        allowed = parse_allowed(allow_different or ())
        found = select(read_results_figures([results]), case, suite, str(results))
        held = select(read_baseline(baseline), case, suite, str(baseline))
        report = check_figures(
            found, held, gates, allow_different=allowed, ratchet=ratchet, fail_on_new=fail_on_new
        )
        command = shlex.join(["membench", "baseline", str(results), "-o", str(baseline)])
        _write_summaries(check_summary(report, command), summary)
    if json:
        import json as json_module

        print(json_module.dumps(report.to_dict()))
    else:
        _print(report, command)
    if not report.passed:
        raise typer.Exit(1)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Read without the cycle collector: it would go through thousands of records, in vain.

    Of 2,000 records with 70 holders each that was a quarter of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _write_summaries(text: str, summary: Path | None) -> None:
    """Write the summary where it is asked for, and append it to that of a GitHub job."""
    job = os.environ.get("GITHUB_STEP_SUMMARY")
    places = [(path, mode) for path, mode in ((summary, "w"), (job and Path(job), "a")) if path]
    for path, mode in places:
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise MembenchError(
                f"cannot write the summary to {path}: {error.strerror or error}"
            ) from None


def _print(report: CheckReport, command: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from bench.explain import growth_text
    from bench.report.check_text import (
        COLUMNS,
        case_cells,
        case_heading,
        counts_text,
        explained,
        gates_text,
    )

    console = out()
    for one in report.differences:
        err().print(f"not alike, as allowed: {one.text}", soft_wrap=True, markup=False)
    cases = report.cases
    if len(cases) > _ROWS:
        cases = tuple(case for case in cases if case.verdict != "same")[:_ROWS]
    rows = [(case, case_cells(case)) for case in cases]
    columns = [c for c in COLUMNS if any(row[c] != "-" for _, row in rows)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for case, row in rows:
        style = "red" if case.fails else "dim" if case.verdict == "same" else "green"
        table.add_row(*(escape(row[column]) for column in columns), style=style)
    if rows:
        console.print(table)
    told, more = explained(report)
    for case in told:
        console.print(f"\n{case_heading(case)}", style="bold", soft_wrap=True, markup=False)
        if case.growth is not None:
            console.print(growth_text(case.growth), soft_wrap=True, markup=False)
    if more:
        console.print(f"\n{more} more grew: membench compare explains each", soft_wrap=True)
    console.print(f"\n{counts_text(report)}; {gates_text(report)}", soft_wrap=True, markup=False)
    if report.unrecorded:
        console.print(f"record what is better or new: {command}", soft_wrap=True, markup=False)
