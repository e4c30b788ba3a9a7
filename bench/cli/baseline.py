"""``membench baseline``: the figures of a run, as the file that later runs are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.console import out, user_errors

__all__ = ["baseline"]


def baseline(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Records (.jsonl) of membench run, or folders of them.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write.", show_default=False)
    ],
    case: Annotated[
        list[str] | None,
        typer.Option(help="Take only the cases that match this glob; may be repeated."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Take only the cases of this suite.")] = None,
    allow_fewer: Annotated[
        bool,
        typer.Option("--allow-fewer", help="Let cases go that the file has and the results lack."),
    ] = False,
) -> None:
    """Write the last record of each case, with who holds its peak, as a baseline for check."""
    with user_errors():
        from bench.baseline import write_baseline
        from bench.figures import read_results_figures, select

        where = ", ".join(map(str, results))
        figures = select(read_results_figures(results), case, suite, where)
        write_baseline(output, figures, allow_fewer=allow_fewer)
    count = f"{len(figures)} case{'s' * (len(figures) != 1)}"
    out().print(f"baseline: {output}, {count}", soft_wrap=True, markup=False)
