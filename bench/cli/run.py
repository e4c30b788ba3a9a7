"""``membench run``: every case of a suite, measured or predicted, into one results file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.backends import Device, measured_backend, predicted_backend, use_cuda
from bench.cli.console import err, is_terminal, out, user_errors
from bench.environment import read_environment
from bench.errors import MembenchError
from bench.predict.cards import Card, find_card
from bench.record import Record, results_file
from bench.resume import finished_cases, untried_first
from bench.runner import Progress, Run, TimeLimit, make_writable, run_cases

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from bench.case import Case
    from bench.record import Environment
    from bench.suite import Suite

__all__ = ["run"]


def run(
    suite: Annotated[str, typer.Argument(help="A suite file, or the name of a shipped suite.")],
    device: Annotated[
        Device, typer.Option(help="Measure on a GPU, predict without one; auto: as there is one.")
    ] = "auto",
    card: Annotated[
        str | None,
        typer.Option(help="Predict for this card, or cap the GPU to it (see: list cards)."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Run only the cases whose name matches this glob; may be repeated."),
    ] = None,
    volumes: Annotated[
        Path | None, typer.Option(help="Take the input shapes from the NIfTI files of a folder.")
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="With --volumes: resample to this spacing in mm, as 1.62,1.62,3.22."),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder for the records.")] = Path("my-results"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished cases, run the others.")
    ] = False,
    time_limit: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="Seconds for all; --resume goes on, and gives up what twice ended at it."
        ),
    ] = None,
    exclusive: Annotated[
        bool,
        typer.Option("--exclusive", help="Measure only while no other process is on the GPU."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON record a line, nothing else.")
    ] = False,
) -> None:
    """Run every case of a suite, print the table and append the records."""
    with user_errors():
        limit = None if time_limit is None else TimeLimit.from_now(time_limit)
        records, paths, left = _run(
            *(suite, device, card, case, volumes, spacing, results, resume, limit, exclusive, json)
        )
        if not json:
            _print_table(records, paths)
        if left:
            err().print(f"{left} cases are left: run it again with --resume", soft_wrap=True)
    if left or any(record.status in ("failed", "timeout", "skipped") for record in records):
        raise typer.Exit(1)


def _run(
    suite_name: str,
    device: Device,
    card_name: str | None,
    glob: list[str] | None,
    volumes: Path | None,
    spacing: str | None,
    results: Path,
    resume: bool,
    limit: TimeLimit | None,
    exclusive: bool,
    json: bool,
) -> tuple[list[Record], list[Path], int]:
    """Return the records, the files they are in, and how many cases have none for want of time."""
    from bench.suite import load_suite

    suite = load_suite(suite_name)
    cases = suite.cases(volumes=volumes, spacing=spacing, glob=glob)
    environment = read_environment(suite=suite.name, suite_hash=suite.digest)
    if use_cuda(device):
        emulated = find_card(card_name) if card_name is not None else None
        backend = measured_backend(emulated, exclusive=exclusive)
    else:
        if exclusive:
            raise MembenchError("--exclusive: a prediction runs on no GPU; leave the option out")
        records, paths = _predict(
            suite, cases, environment, card_name, results, resume, limit, json
        )
        return records, paths, len(cases) - len(records)
    plan = Run(
        cases=cases,
        backend=backend,
        environment=environment,
        path=results_file(results, backend.card, suite.name, backend.evidence),
        limit=limit,
    )
    make_writable(plan.path)
    if backend.warning:
        err().print(f"warning: {backend.warning}", soft_wrap=True, markup=False)
    records = _execute(plan, resume, json)
    return records, [plan.path], len(cases) - len(records)


def _predict(
    suite: Suite,
    cases: list[Case],
    environment: Environment,
    card_name: str | None,
    results: Path,
    resume: bool,
    limit: TimeLimit | None,
    json: bool,
) -> tuple[list[Record], list[Path]]:
    """Predict the cases, a results file for each card; the records in the order of the suite."""
    plans = []
    for card, of_card in _cards_to_predict(suite, cases, card_name):
        backend, why = predicted_backend(card)
        plans.append(
            Run(
                cases=of_card,
                backend=backend,
                environment=dataclasses.replace(environment, card_hash=card.digest()),
                path=results_file(results, backend.card, suite.name, backend.evidence),
                limit=limit,
            )
        )
        make_writable(plans[-1].path)
    if plans[0].backend.tracer == "cpu":
        err().print(f"tracing on the CPU, not as on CUDA: {why}", soft_wrap=True, markup=False)
    found = {record.case: record for plan in plans for record in _execute(plan, resume, json)}
    records = [found[case.name] for case in cases if case.name in found]
    return records, [plan.path for plan in plans]


def _cards_to_predict(
    suite: Suite, cases: list[Case], named: str | None
) -> list[tuple[Card, list[Case]]]:
    """Return the cases by card: what the command line names, else the row's, else the suite's."""
    by_name: dict[str, list[Case]] = {}
    for case in cases:
        name = named if named is not None else case.card or suite.card
        if name is None:
            raise MembenchError(f"suite {suite.name} names no card: choose one with --card")
        by_name.setdefault(name, []).append(case)
    return [(find_card(name), of_card) for name, of_card in by_name.items()]


def _execute(plan: Run, resume: bool, json: bool) -> list[Record]:
    """Run what is not finished; return all records in the order of the suite."""
    kept = finished_cases(plan) if resume else {}
    ordered = untried_first(plan) if resume else plan.cases
    waiting = [case for case in ordered if case.name not in kept]
    if json:
        for record in kept.values():
            _print_json(record)
    fresh: list[Record] = []
    if waiting:
        with _progress(len(waiting)) as bar:
            report = _reporter(bar, len(waiting), json)
            try:
                fresh = run_cases(dataclasses.replace(plan, cases=waiting), report)
            except KeyboardInterrupt:
                err().print(
                    f"interrupted; finished cases are in {plan.path}, --resume runs the others",
                    soft_wrap=True,
                    markup=False,
                )
                raise typer.Exit(130) from None
    by_name = kept | {record.case: record for record in fresh}
    return [by_name[case.name] for case in plan.cases if case.name in by_name]


def _progress(total: int) -> Bar:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err(),
        transient=True,
        redirect_stdout=False,  # rich would take the JSON records to stderr, where the bar is
        disable=not is_terminal(sys.stderr),
    )
    bar.add_task("starting", total=total)
    return bar


def _reporter(bar: Bar, total: int, json: bool) -> Callable[[Progress], None]:
    """Show each case as it begins and ends; without a terminal, a line on stderr as it ends."""
    done = 0

    def report(progress: Progress) -> None:
        nonlocal done
        task = bar.task_ids[0]
        if progress.record is None:
            bar.update(task, description=_shown(progress.case))
            return
        done += 1
        bar.update(task, completed=done)
        if not is_terminal(sys.stderr):
            line = f"[{done}/{total}] {progress.case.name}: {progress.record.status}"
            err().print(line, soft_wrap=True, markup=False)
        if json:
            _print_json(progress.record)

    return report


def _shown(case: Case) -> str:
    return case.name if len(case.name) <= 60 else "..." + case.name[-57:]


def _print_json(record: Record) -> None:
    print(record.to_json(), flush=True)


def _print_table(records: list[Record], paths: list[Path]) -> None:
    from bench.report.terminal import results_table

    out().print(results_table(records))
    failed = [r for r in records if r.status in ("failed", "timeout", "skipped")]
    for record in failed:
        err().print(
            f"{record.case}: {record.status}: {record.reason}", soft_wrap=True, markup=False
        )
    for path in paths:
        out().print(f"records: {path}", soft_wrap=True, markup=False)
