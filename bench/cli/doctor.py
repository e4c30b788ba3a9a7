"""``membench doctor``: what this machine offers, what is missing, and what to do about it."""

from __future__ import annotations

import dataclasses
import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import out, user_errors

if TYPE_CHECKING:
    from bench.doctor import Diagnosis

__all__ = ["doctor"]

_COLOURS = {"ok": "green", "missing": "yellow", "problem": "red"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine can run, and what to do about what is missing.

    Exit code 0 when cases can be run, if only predicted; 1 when nothing can run.
    """
    from bench.doctor import diagnose

    with user_errors():
        diagnosis = diagnose()
    if json:
        print(json_module.dumps(dataclasses.asdict(diagnosis)))
    elif out().is_terminal:
        _print_table(diagnosis)
    else:
        for check in diagnosis.checks:
            advice = f"; {check.advice}" if check.advice else ""
            print(f"{check.name}: {check.state}: {check.found}{advice}")
        print(_verdict(diagnosis))
    if not (diagnosis.can_predict or diagnosis.can_measure):
        raise typer.Exit(1)


def _print_table(diagnosis: Diagnosis) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("", "", "found", "to do"):
        table.add_column(heading, overflow="fold")
    for check in diagnosis.checks:
        state = Text(check.state, style=_COLOURS[check.state])
        table.add_row(check.name, state, Text(check.found), Text(check.advice))
    out().print(table)
    out().print(_verdict(diagnosis))


def _verdict(diagnosis: Diagnosis) -> str:
    if diagnosis.can_measure:
        return "cases can be measured here" + (" and predicted" if diagnosis.can_predict else "")
    if diagnosis.can_predict:
        return "cases can be predicted here, not measured"
    return "no case can be run here"
