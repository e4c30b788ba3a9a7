"""``membench trace``: one case's every allocation, for PyTorch's memory page or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.backends import Device, use_cuda
from bench.cli.console import err, out, user_errors
from bench.errors import MembenchError

if TYPE_CHECKING:
    from bench.case import Case
    from bench.suite import Suite

__all__ = ["trace"]

_LISTED = 20


def trace(
    suite: Annotated[str, typer.Argument(help="A suite file, or the name of a shipped suite.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="FILE.pickle: PyTorch's snapshot; FILE.json: trace events for Perfetto.",
        ),
    ],
    case: Annotated[
        list[str] | None, typer.Option(help="The case, or a glob that one case matches.")
    ] = None,
    device: Annotated[
        Device, typer.Option(help="Measure on a GPU, predict without one; auto: as there is one.")
    ] = "auto",
    card: Annotated[
        str | None, typer.Option(help="Predict for this card (see: list cards).")
    ] = None,
) -> None:
    """Write every allocation and release of a case, with the modules and lines that made them."""
    with user_errors():
        from bench.export import check_path
        from bench.suite import load_suite

        check_path(output)
        loaded = load_suite(suite)
        one = _find(loaded, case)
        if use_cuda(device):
            summary = _measured(one, output, card)
        else:
            summary = _predicted(loaded, one, output, card)
    out().print(summary, soft_wrap=True, markup=False)


def _find(suite: Suite, globs: list[str] | None) -> Case:
    """Return the one case that is meant; raise MembenchError listing them if it is not one."""
    cases = suite.cases(glob=globs)
    exact = [case for case in cases if set(globs or ()) & set(case.aliases)]
    found = exact if len(exact) == 1 else cases
    if len(found) > 1:
        listed = ", ".join(case.name for case in found[:_LISTED])
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        asked = ", ".join(map(repr, globs)) if globs else "suite " + suite.name
        raise MembenchError(f"{asked} is {len(found)} cases, name one by --case: {listed}{more}")
    return found[0]


def _predicted(suite: Suite, case: Case, output: Path, card_name: str | None) -> str:
    from bench.export import write_trace
    from bench.prediction import predict_case

    name = suite.card if card_name is None else card_name
    if name is None:
        raise MembenchError(f"suite {suite.name} names no card: choose one with --card")
    prediction = predict_case(case, name)
    entries = write_trace(output, prediction)
    if prediction.status == "oom":
        err().print(f"{case.name}: {prediction.reason}; the trace ends there", soft_wrap=True)
    return f"{case.name} on {name}, predicted ({prediction.tracer}): {entries} entries in {output}"


def _measured(case: Case, output: Path, card_name: str | None) -> str:
    from bench.export.measured import measure_snapshot

    if output.suffix != ".pickle":
        raise MembenchError(
            f"{output}: a measured trace is PyTorch's own snapshot: write it to FILE.pickle, or "
            "give --device predict"
        )
    gpu, entries = measure_snapshot(case, output, card_name)
    return f"{case.name} on {gpu}, measured: {entries} entries in {output}"
