"""``membench report``: records as markdown tables and plots, one file for each suite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.console import out, user_errors
from bench.errors import MembenchError

__all__ = ["report"]


def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of records (.jsonl), or folders searched for them.", show_default=False
        ),
    ] = None,
    all_papers: Annotated[
        bool,
        typer.Option(
            "--all", help="Write papers.md too, a table a paper; of results/ where none is given."
        ),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("reports"),
) -> None:
    """Write a markdown report with plots for each suite whose records are given."""
    with user_errors():
        if not results and not all_papers:
            raise MembenchError(
                "no results given: name .jsonl files or folders that membench run wrote, or "
                "take all of results/ with --all"
            )
        from bench.report.markdown import write_reports
        from bench.report.results import read_results

        written = write_reports(
            read_results(results or [Path("results")]), output, papers=all_papers
        )
    for path in written:
        out().print(f"report: {path}", soft_wrap=True, markup=False)
