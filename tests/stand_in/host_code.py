"""Holds predictions against torch's own CUDA host code: ``reports/host_code.md``.

``python -m tests.stand_in.host_code [--python PY] [--card NAME] [--results DIR] [-o DIR] SUITE...``
measures every case of the suites on the stand-in GPU with ``PY``, predicts it here for a card of
the same memory with no workspace and no context, and writes how far the two are from each other.
Exit code 0: done, whatever was found; 1: measuring failed; 2: it cannot be done, and why.

Records are written into ``--results``, by default a folder that goes away; with it, a run that was
ended goes on where it stopped. They say ``stand-in`` where others name their GPU, and no report but
this one takes them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.errors import MembenchError
from bench.fidelity import Compared, Fidelity, Quantity, compare, measured_records
from bench.record import Record
from bench.report.fidelity import differing_lines
from bench.report.markdown import write_files
from bench.report.results import read_results
from bench.runner import Progress
from bench.units import format_bytes
from tests.stand_in.__main__ import add_options, run_on_stand_in
from tests.stand_in.pose import NAME, write_card

__all__ = ["FILE_NAME", "compare_suites", "host_code_markdown", "main", "stand_in_records"]

FILE_NAME = "host_code.md"
_ROOT = Path(__file__).resolve().parents[2]
_WORST = 10
_FIELDS: dict[Quantity, str] = {
    "requested": "peak_requested_bytes",
    "allocated": "peak_allocated_bytes",
    "reserved": "peak_reserved_bytes",
}
_INTRODUCTION = f"""\
What is held against what: the figures called *torch* come from PyTorch's CUDA build itself, on a
stand-in GPU (`{NAME}`, see `tests/stand_in`). Its autograd, its CUDA operators with their hidden
temporaries, Triton's launches and its caching allocator ran for real; device memory was a count of
bytes, and no kernel ran. Predictions are for a card of the same memory. The workspaces of
convolutions and the CUDA context are 0 on both sides. **So workspaces, contexts and times are not
judged here, and nothing here was measured on a GPU.**"""
_LEGEND = """\
Differences are predicted less torch's, in bytes; the median is of their sizes. The last column is
the largest of them as a share of torch's figure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, predict, write the report."""
    chosen = _parser().parse_args(arguments)
    try:
        with _folder(chosen.results) as results:
            for suite in chosen.suites:
                if (code := _measure(chosen, suite, results)) != 0:
                    print(f"error: measuring {suite} ended with {code}", file=sys.stderr)
                    return 1
            records = stand_in_records(results)
        found = compare_suites(records, chosen.card)
        write_files(chosen.output, {FILE_NAME: host_code_markdown(found).encode()})
    except MembenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {chosen.output / FILE_NAME}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.stand_in.host_code", description=(__doc__ or "").partition("\n")[0]
    )
    add_options(parser)
    parser.add_argument("--results", type=Path, help="folder for records, to go on from")
    parser.add_argument(
        *("-o", "--output"),
        type=Path,
        default=Path("reports"),
        help=f"folder for {FILE_NAME} (default: %(default)s)",
    )
    parser.add_argument("suites", nargs="+", metavar="SUITE", help="shipped suites, or their files")
    return parser


@contextmanager
def _folder(results: Path | None) -> Iterator[Path]:
    if results is not None:
        if _ROOT / "results" in [results.resolve(), *results.resolve().parents]:
            raise MembenchError(
                f"--results {results}: results/ holds what GPUs measured; choose another folder"
            )
        yield results
        return
    with tempfile.TemporaryDirectory(prefix="stand-in-results-") as folder:
        yield Path(folder)


def _measure(chosen: argparse.Namespace, suite: str, results: Path) -> int:
    command = ["-m", "bench", "run", suite, "--device", "cuda", "--results", str(results)]
    with _variables({"STANDIN_CONTEXT_BYTES": "0", "STANDIN_WORKSPACE_BYTES": "0"}):
        code = run_on_stand_in(chosen.python, chosen.card, [*command, "--resume"])
    return 0 if code == 1 else code  # 1: a case failed, which its record says


@contextmanager
def _variables(changed: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def stand_in_records(results: Path) -> dict[str, list[Record]]:
    """Return suite -> records measured on the stand-in, of a folder or file.

    Raises MembenchError where there is none, or where another GPU's are among them.
    """
    by_suite = read_results([results])
    measured = measured_records(by_suite, [results])
    others = {str(r.environment.gpu) for r in measured if r.environment.gpu != NAME}
    if others:
        raise MembenchError(
            f"{results} holds records of {', '.join(sorted(others))}, which is no stand-in; "
            "membench fidelity compares those"
        )
    return {
        suite: [r for r in records if r.evidence == "measured"]
        for suite, records in by_suite.items()
    }


def compare_suites(by_suite: Mapping[str, Sequence[Record]], posed: str) -> dict[str, Fidelity]:
    """Predict every record's case for the stand-in's card, in this interpreter's torch."""
    found: dict[str, Fidelity] = {}
    with tempfile.TemporaryDirectory(prefix="stand-in-cards-") as cards:
        ended = [r for records in by_suite.values() for r in records if r.status in ("ok", "oom")]
        for memory_bytes in set(map(_memory_bytes, ended)):
            write_card(posed, memory_bytes, 0, Path(cards))
        with _variables({"MEMBENCH_CARDS": cards}):
            for suite, records in by_suite.items():
                found[suite] = compare(records, _reported)
    return found


def _memory_bytes(record: Record) -> int:
    """Return the stand-in's memory: all of it was the allocator's, there was no context."""
    if record.capacity_bytes is None or record.capped_to is not None:
        raise MembenchError(f"the record of {record.case} does not say the stand-in's memory")
    return record.capacity_bytes


def _reported(progress: Progress) -> None:
    if progress.record is not None:
        print(f"{progress.case.name}: {progress.record.status}", file=sys.stderr)


# -- the report -----------------------------------------------------------------------------------


def host_code_markdown(by_suite: Mapping[str, Fidelity]) -> str:
    """Return the whole report: a section for each suite, after what is judged and what is not."""
    everything = [one for found in by_suite.values() for one in found.compared]
    text = [
        "# Predictions held against torch's own CUDA host code",
        "*Made by `python -m tests.stand_in.host_code`. Do not edit: make it again.*",
        _INTRODUCTION,
        _made_with(everything),
        _LEGEND,
    ]
    for suite, found in by_suite.items():
        text += [f"## {suite}", *_section(found)]
    return "\n\n".join(text) + "\n"


def _made_with(compared: Sequence[Compared]) -> str:
    lines: dict[str, None] = {}
    for one in compared:
        theirs, ours = one.measured.environment, one.predicted.environment
        lines[f"- torch: torch {theirs.torch}, CUDA {theirs.cuda}, driver {theirs.driver}"] = None
        lines[f"- predicted: torch {ours.torch}, tracer {one.predicted.tracer}"] = None
    return "\n".join(lines) or "Nothing was compared."


def _section(found: Fidelity) -> list[str]:
    text = [_table(_rows(found.compared)) or "No case is `ok` on both sides."]
    differing = [one for one in found.compared if any(_difference(one, q) for q in _FIELDS)]
    if differing:
        text.append(_worst_title(len(differing)))
        text.append(
            _table([_case_row(one) for one in sorted(differing, key=_size)[-_WORST:][::-1]])
        )
    if found.agreed_oom:
        text.append(f"Out of memory on both sides: {len(found.agreed_oom)} cases.")
    if lines := differing_lines(found):
        text.append("\n".join(f"- {line}" for line in lines))
    return text


def _worst_title(count: int) -> str:
    cases = "one case differs" if count == 1 else f"{count} cases differ"
    return f"{cases[0].upper()}{cases[1:]}" + (f"; the worst {_WORST}:" if count > _WORST else ":")


def _rows(compared: Sequence[Compared]) -> list[dict[str, str]]:
    rows = []
    for quantity in _FIELDS:
        found = [d for one in compared if (d := _difference(one, quantity)) is not None]
        if found:
            shares = [abs(e) for one in compared if (e := one.error(quantity)) is not None]
            rows.append(
                {
                    "bytes": quantity,
                    "cases": str(len(found)),
                    "equal to the byte": str(found.count(0)),
                    "median": format_bytes(round(statistics.median(map(abs, found)))),
                    "lowest": _signed(min(found)),
                    "highest": _signed(max(found)),
                    "largest, of torch's": f"{max(shares):.4%}".replace("%", " %"),
                }
            )
    return rows


def _case_row(one: Compared) -> dict[str, str]:
    sizes = {quantity: _difference(one, quantity) for quantity in _FIELDS}
    return {
        "case": one.measured.case,
        **{name: "-" if size is None else _signed(size) for name, size in sizes.items()},
        "reserved, torch": format_bytes(one.measured.peak_reserved_bytes or 0),
    }


def _difference(one: Compared, quantity: Quantity) -> int | None:
    ours, theirs = (getattr(side, _FIELDS[quantity]) for side in (one.predicted, one.measured))
    return None if ours is None or theirs is None else int(ours - theirs)


def _size(one: Compared) -> float:
    return max(abs(one.error(quantity) or 0.0) for quantity in _FIELDS)


def _signed(size_bytes: int) -> str:
    return ("+" if size_bytes > 0 else "") + format_bytes(size_bytes)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    import pandas as pd

    from bench.report.grids import escaped, markdown_table

    return markdown_table(pd.DataFrame([{k: escaped(v) for k, v in r.items()} for r in rows]), 1)


if __name__ == "__main__":
    sys.exit(main())
