"""``membench calibrate``: a GPU's context and its libraries' workspaces into its card's file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import err, is_terminal, out, user_errors

if TYPE_CHECKING:
    from bench.calibrate.calibrate import Outcome
    from bench.calibrate.session import Asked

__all__ = ["calibrate"]

_LINE_EVERY = 100  # without a terminal


def calibrate(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the card's file; by default your own."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Measure what this suite calls; again for more. By default all."),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(min=1.0, help="Seconds; the next run goes on where this one stops.")
    ] = 540.0,
    hold_out: Annotated[
        float,
        typer.Option(min=0.0, max=0.9, help="Share of the input shapes kept out of predictions."),
    ] = 0.1,
) -> None:
    """Measure this GPU for predictions; exit code 1 when the time was over before the end."""
    with user_errors():
        from bench.calibrate.calibrate import Settings, check_gpu
        from bench.calibrate.calibrate import calibrate as measure

        check_gpu()
        settings = Settings(
            folder=output,
            suites=tuple(suite) if suite else None,
            limit_s=time_limit,
            hold_out=hold_out,
        )
        outcome = measure(settings, _report)
    _print(outcome)
    if outcome.untraced:
        err().print(
            f"{outcome.untraced} of the suites' cases are not traced yet, which comes first: run "
            "membench calibrate again",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    if not outcome.complete:
        err().print(
            f"{outcome.section.remaining} readings are left: run membench calibrate again",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _report(asked: Asked) -> None:
    if is_terminal(sys.stderr):
        err().print(f"{asked.done}/{asked.total}", end="\r")
    elif asked.done % _LINE_EVERY == 0 or asked.done == asked.total:
        err().print(f"[{asked.done}/{asked.total}]", markup=False)


def _print(outcome: Outcome) -> None:
    from bench.units import format_bytes

    section, console = outcome.section, out()
    context = section.context
    for name, what in (("bare_bytes", "bare"), ("cudnn_bytes", "with cuDNN")):
        if context.get(name) is not None:
            console.print(f"context, {what}: {format_bytes(context[name])}")
    if context.get("networks_bytes"):
        console.print(f"context, with a network: {format_bytes(outcome.card.context_bytes)}")
    console.print(
        f"convolutions: {len(section.readings)} measured, {len(section.held_out)} held out; "
        f"other operators: {len(section.seen_operators)}",
        soft_wrap=True,
    )
    measured, exact = context.get("cublas_workspace_bytes"), outcome.card.cublas_workspace_bytes
    if measured is not None and measured != exact:
        err().print(
            f"cuBLAS took {measured} bytes, torch's rule says {exact}: predictions use the rule "
            "(is CUBLAS_WORKSPACE_CONFIG set?)",
            soft_wrap=True,
            markup=False,
        )
    for note in section.notes:
        err().print(note, soft_wrap=True, markup=False)
    console.print(f"card: {outcome.path}", soft_wrap=True, markup=False)
