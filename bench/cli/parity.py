"""``membench parity``: a suite's cases trained side by side, and who stays with the plain one."""

from __future__ import annotations

import json as json_module
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import err, out, user_errors
from bench.errors import MembenchError

if TYPE_CHECKING:
    from rich.table import Table

    from bench.parity_session import Outcome

__all__ = ["parity"]


def parity(
    suite: Annotated[str, typer.Argument(help="A suite file, or the name of a shipped suite.")],
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each run, instead of the suite's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, crops and dropout, instead of the suite's.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="Train only the cases that match this glob (it may be repeated), and their pairs."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Train on this NIfTI volume, not on the MNI152 head.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Its labels: whole numbers from 0, on the same grid.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report and its plot.")] = Path(
        "reports"
    ),
    results: Annotated[Path, typer.Option(help="Folder for the curves, by step.")] = Path(
        "my-results"
    ),
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line, nothing else.")
    ] = False,
) -> None:
    """Train a suite's cases on one volume, and compare their curves of Dice and loss.

    Exits with 1 where a run diverges or a technique leaves its band.
    """
    with user_errors():
        from bench.parity_session import Request, run_session

        if (image is None) != (labels is None):
            raise MembenchError("--image and --labels belong together: give both, or neither")
        request = Request(
            suite=suite,
            steps=steps,
            seed=seed,
            glob=case,
            image=image,
            labels=labels,
            output=output,
            results=results,
            command=_command(suite, steps, seed, case, image, labels),
        )
        outcome = run_session(
            request,
            say=lambda text: err().print(text, soft_wrap=True, markup=False),
            on_line=(lambda line: print(json_module.dumps(line), flush=True)) if json else None,
        )
        if not json:
            _print(outcome)
    if not outcome.passed:
        raise typer.Exit(1)


def _command(
    suite: str, steps: int | None, seed: int | None, cases: list[str] | None, *volume: Path | None
) -> str:
    """Return the command that makes the report again, wherever it is told to write it."""
    words = ["membench", "parity", suite]
    words += [] if steps is None else ["--steps", str(steps)]
    words += [] if seed is None else ["--seed", str(seed)]
    for glob in cases or ():
        words += ["--case", glob]
    for option, value in zip(("--image", "--labels"), volume, strict=True):
        words += [] if value is None else [option, str(value)]
    return shlex.join(words)


def _print(outcome: Outcome) -> None:
    from bench.report.parity import (
        PAIR_HEADINGS,
        RUN_HEADINGS,
        comparison_rows,
        run_rows,
        trained_on,
    )

    console = out()
    console.print(trained_on(outcome.training), soft_wrap=True, markup=False)
    console.print(_table("Runs, measured", RUN_HEADINGS, run_rows(outcome.runs, outcome.training)))
    if outcome.comparisons:
        rows = comparison_rows(outcome.comparisons)
        console.print(_table("Loss beside the plain network's", PAIR_HEADINGS, rows))
    for line in outcome.findings:
        console.print(f"- {line}", soft_wrap=True, markup=False)
    console.print(f"curves: {outcome.curves}", soft_wrap=True, markup=False)
    console.print(f"report: {outcome.report}", soft_wrap=True, markup=False)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
