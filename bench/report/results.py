"""Records from result files and folders, by suite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.errors import MembenchError
from bench.record import Record, last_records, read_records

__all__ = ["CURVES_FOLDER", "read_results", "suite_name"]

CURVES_FOLDER = "parity"
"""Where, in a folder of results, ``membench parity`` keeps its curves, which are no records."""


def read_results(paths: Sequence[Path]) -> dict[str, list[Record]]:
    """Return suite name -> the last record of each of its cases, from files and folders.

    Folders are searched for ``*.jsonl``, but for the curves of ``membench parity``, in the order
    of their names; a record in a later file replaces an equal case of the same suite, card and
    evidence in an earlier one. A case that two suites share stays in both.

    Errors: MembenchError for a path that is not there, for a line that is not a record (naming
    file and line), and when no record is found at all.
    """
    by_suite: dict[str, list[Record]] = {}
    for file in _files(paths):
        for record in read_records(file):
            by_suite.setdefault(suite_name(record) or file.name.split(".")[0], []).append(record)
    if not by_suite:
        given = ", ".join(str(path) for path in paths)
        raise MembenchError(
            f"no records in {given}: give .jsonl files that membench run wrote, or a folder"
        )
    return {suite: last_records(records) for suite, records in by_suite.items()}


def suite_name(record: Record) -> str:
    """Return the name of the suite that a record came from, "" where it does not say.

    Only the last part of a path is taken, without its ending: the name becomes a file's.
    """
    suite = record.environment.suite or ""
    return Path(suite).name.removesuffix(".yaml").removesuffix(".yml")


def _files(paths: Iterable[Path]) -> list[Path]:
    """Return every file once, in the order given."""
    found: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                found += sorted(f for f in path.rglob("*.jsonl") if f.parent.name != CURVES_FOLDER)
            elif path.exists():
                found.append(path)
            else:
                raise MembenchError(
                    f"{path} does not exist: give a .jsonl file that membench run wrote, "
                    "or a folder"
                )
        except OSError as error:
            raise MembenchError(f"cannot read results {path}: {error.strerror}") from None
    return list({file.resolve(): file for file in found}.values())
