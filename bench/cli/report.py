"""``membench report``: records as markdown tables and plots, one file for each suite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.console import out, user_errors

__all__ = ["report"]


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Files of records (.jsonl), or folders searched for them.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("reports"),
) -> None:
    """Write a markdown report with plots for each suite whose records are given."""
    with user_errors():
        from bench.report.markdown import write_reports
        from bench.report.results import read_results

        written = write_reports(read_results(results), output)
    for path in written:
        out().print(f"report: {path}", soft_wrap=True, markup=False)
