"""``membench report``: records as tables and pictures, one file for each suite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.console import out, user_errors
from bench.errors import MembenchError
from bench.report.formats import ReportFormat

__all__ = ["report"]


def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of records (.jsonl), or folders searched for them.", show_default=False
        ),
    ] = None,
    form: Annotated[
        ReportFormat,
        typer.Option(
            "--format",
            help="markdown with plots; html: a page a suite that needs no network; latex: tables.",
        ),
    ] = ReportFormat.MARKDOWN,
    figures: Annotated[
        bool, typer.Option("--figures", help="Write every picture as PNG and SVG too.")
    ] = False,
    all_papers: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Take results/ where none is given; in markdown write papers.md too, a table "
            "a paper.",
        ),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("reports"),
) -> None:
    """Write a report for each suite whose records are given: tables and pictures."""
    with user_errors():
        if not results and not all_papers:
            raise MembenchError(
                "no results given: name .jsonl files or folders that membench run wrote, or "
                "take all of results/ with --all"
            )
        from bench.report.formats import write_formatted
        from bench.report.results import read_results

        by_suite = read_results(results or [Path("results")])
        written = write_formatted(by_suite, output, form, papers=all_papers, figures=figures)
    for path in written:
        out().print(f"report: {path}", soft_wrap=True, markup=False)
