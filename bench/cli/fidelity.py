"""``membench fidelity``: how far predictions are from measured records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import err, out, user_errors
from bench.errors import MembenchError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from bench.fidelity import Fidelity, Predicting
    from bench.record import Record
    from bench.runner import Progress
    from bench.trace_alignment import Alignment

__all__ = ["fidelity"]


def fidelity(
    results: Annotated[
        list[Path],
        typer.Argument(help="Files of measured records (.jsonl), or folders of them."),
    ],
    case: Annotated[
        list[str] | None,
        typer.Option(help="Compare only the cases whose name matches this glob; may be repeated."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Align this memory snapshot of the one case with its predicted events; say where "
            "they part."
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line, nothing else.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the report fidelity.md, such as reports.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Keep the predictions in this folder, and take those of this commit."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(min=1.0, help="Seconds; with --keep the next run goes on. Exit code 1 then."),
    ] = None,
) -> None:
    """Predict every measured case again, for its card, and print the errors."""
    with user_errors():
        from bench.fidelity import Predicting, measured_records
        from bench.report.results import read_results
        from bench.runner import TimeLimit

        limit = None if time_limit is None else TimeLimit.from_now(time_limit)
        if trace is not None:
            _check_alone({"--output": output, "--keep": keep, "--time-limit": time_limit})

        records = _chosen(measured_records(read_results(results), results), case)
        if trace is not None:
            _print_alignment(_align(trace, records), json)
            return
        left = _compare(records, json, output, Predicting(kept=keep, limit=limit))
    if left:
        again = "run it again" if keep else "give it longer, or a folder with --keep"
        err().print(f"no time was left for {left} cases: {again}", soft_wrap=True)
        raise typer.Exit(1)


def _chosen(records: list[Record], globs: list[str] | None) -> list[Record]:
    from bench.globs import choose

    chosen, missing = choose(records, globs, lambda record: (record.case,))
    if missing is not None:
        raise MembenchError(
            f"no measured case matches {missing!r}; there are "
            f"{', '.join(sorted({r.case for r in records})[:10])}"
        )
    return chosen


def _compare(records: list[Record], json: bool, output: Path | None, how: Predicting) -> int:
    from bench.fidelity import compare
    from bench.report.fidelity import differing_lines, fidelity_markdown
    from bench.report.markdown import write_files

    found = compare(records, _reporter(len(records)), how)
    if json:
        import json as json_module

        for one in found.compared:
            print(json_module.dumps(one.to_dict()))
    else:
        _print(found)
    for line in differing_lines(found):
        err().print(line, soft_wrap=True, markup=False)
    if output is not None:
        write_files(output, {"fidelity.md": fidelity_markdown(found).encode()})
        if not json:
            out().print(f"report: {output / 'fidelity.md'}", soft_wrap=True, markup=False)
    return found.left


class _Reporter:
    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total

    def __call__(self, progress: Progress) -> None:
        if progress.record is not None:
            self.done += 1
            line = f"[{self.done}/{self.total}] {progress.case.name}: {progress.record.status}"
            err().print(line, soft_wrap=True, markup=False)


def _reporter(total: int) -> _Reporter:
    return _Reporter(total)


def _print(found: Fidelity) -> None:
    from bench.report.fidelity import cause_rows, summary_rows, worst_rows

    for title, rows in (
        ("Error of predictions: predicted over measured, less 1", summary_rows(found.compared)),
        ("Predicted less measured, by cause", cause_rows(found.compared)),
        ("Worst cases", worst_rows(found.compared, 5)),
    ):
        if rows:
            _print_table(title, rows)
    out().print(
        f"{len(found.compared)} compared, {len(found.agreed_oom)} out of memory on both sides, "
        f"{len(found.differing)} with another verdict, {len(found.not_predicted)} not compared",
        soft_wrap=True,
    )


def _print_table(title: str, rows: list[dict[str, str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("case", "shapes", "bytes") else "right")
    for row in rows:
        table.add_row(*(escape(text) for text in row.values()))
    out().print(table)


def _check_alone(options: dict[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            raise MembenchError(f"--trace compares the events of one case: leave out {name}")


def _align(path: Path, records: list[Record]) -> Alignment:
    from bench.predict.trace_file import read_trace
    from bench.predicted_trace import predicted_trace
    from bench.trace_alignment import align

    recorded = read_trace(path)
    return align(predicted_trace(_traced(path, recorded.definition, records)), recorded)


def _traced(path: Path, definition: Mapping[str, Any], records: list[Record]) -> Record:
    """Return the record of the trace's case: by its definition where the file has one."""
    from bench.case import Case, definition_digest

    names = ", ".join(list(dict.fromkeys(r.case for r in records))[:10])
    if definition:
        try:
            case = Case.from_definition(dict(definition))
        except MembenchError as error:
            raise MembenchError(f"{path}: {error}") from None
        same = [r for r in records if definition_digest(r.definition) == case.digest()]
        if not same:
            raise MembenchError(
                f"{path} is of {case.name}, of which there is no such measured record; there are "
                f"{names}"
            )
        return same[-1]
    if len({r.case for r in records}) > 1:
        raise MembenchError(f"--trace is of one case, name it with --case: {names}")
    return records[-1]


def _print_alignment(found: Alignment, json: bool) -> None:
    if json:
        import dataclasses
        import json as json_module

        print(json_module.dumps(dataclasses.asdict(found)))
        return
    console = out()
    console.print(
        f"{found.agreeing} of {found.events} recorded allocations and frees as predicted, "
        f"{found.temporaries_agreeing} of {found.temporaries} temporaries before that",
        soft_wrap=True,
    )
    if found.temporary is not None:
        console.print(
            f"temporaries first differ at {found.temporary}", soft_wrap=True, markup=False
        )
    if found.parting is not None:
        console.print(f"tensors part at {found.parting}", soft_wrap=True, markup=False)
    if not found.agreeing:
        err().print("nothing agrees: is the trace of another case?", soft_wrap=True)
