"""``membench score``: how well one label file agrees with another, label by label."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import out, user_errors

if TYPE_CHECKING:
    from rich.table import Table

    from bench.score import FileScores

__all__ = ["score"]


def score(
    prediction: Annotated[Path, typer.Argument(help="Labels to judge, a NIfTI file.")],
    reference: Annotated[Path, typer.Argument(help="Labels that are right, on the same grid.")],
    tolerance_mm: Annotated[
        float, typer.Option(help="How far surfaces may lie apart for the surface Dice.")
    ] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = (
        False
    ),
) -> None:
    """Score labels against a reference: Dice, Hausdorff distances, surface distance and Dice.

    A label that only one of the files has agrees in nothing, and has no distance.
    """
    with user_errors():
        from bench.score import score_files

        result = score_files(prediction, reference, tolerance_mm)
    if json:
        import json as json_module

        print(json_module.dumps(result.to_dict()))
    else:
        out().print(_table(result))


def _table(result: FileScores) -> Table:
    from rich.markup import escape
    from rich.table import Table

    title = escape(f"{result.prediction} against {result.reference}")
    table = Table(title=title, title_justify="left")
    table.add_column("label")
    for heading in (
        "voxels",
        "reference voxels",
        "Dice",
        "Hausdorff max, mm",
        "Hausdorff mean, mm",
        "surface distance, mm",
        f"surface Dice at {result.tolerance_mm:g} mm",
    ):
        table.add_column(heading, justify="right")
    for s in result.scores:
        table.add_row(
            str(s.label),
            f"{s.voxels:,}",
            f"{s.reference_voxels:,}",
            f"{s.dice:.4f}",
            *map(_figure, (s.hausdorff_mm, s.hausdorff_mean_mm, s.surface_distance_mm)),
            f"{s.surface_dice:.4f}",
        )
    means = result.means().values()
    table.add_row("mean", "", "", *map(_figure, means), style="bold")
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
