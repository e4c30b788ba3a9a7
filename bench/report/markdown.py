"""A suite's records as markdown with plots: what ``membench report`` writes into a folder."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from bench.errors import MembenchError
from bench.record import Record
from bench.report.cells import (
    NONE,
    made_with,
    notes,
    table_title,
)
from bench.report.grids import (
    environment_grid,
    escaped,
    figures_grid,
    markdown_table,
    paper_grid,
    parts_grid,
)
from bench.report.results import suite_name
from bench.report.rows import Table, make_tables
from bench.report.scaling import compared_by_size, scaling_text

__all__ = [
    "UNFINISHED",
    "commands",
    "file_name",
    "plot_names",
    "report_files",
    "write_files",
    "write_report",
    "write_reports",
]

_HEAD = "*Made by `membench report` from records. Do not edit: delete it and make it again.*"
_PEAKS_NOTE = (
    "requested, allocated and reserved are the allocator's peaks. One with &gt; is where the run "
    "ended for want of memory."
)
_PARTS_NOTE = (
    "the parts add up to the GPU memory of the process. Where no workspace is named, the tensors' "
    "part holds it: a GPU's allocator cannot tell the two apart."
)
_PLOTS: tuple[Literal["png", "svg"], ...] = ("png", "svg")
UNFINISHED = ("failed", "timeout", "skipped")


def write_report(records: Sequence[Record], folder: Path) -> Path:
    """Write the report of one suite's records and its plots; return the markdown file.

    The file is ``folder/<suite>.md``; the plots lie beside it. Equal records give equal files.

    Errors: MembenchError when the folder cannot be written; what was there before is then left.
    """
    name = suite_name(records[0]) if records else ""
    return write_reports({name or "records": records}, folder)[0]


def write_reports(
    by_suite: Mapping[str, Sequence[Record]], folder: Path, *, papers: bool = False
) -> list[Path]:
    """Write a report for each suite; nothing is written before all of them are made.

    ``papers``: write ``papers.md`` too, a table for each paper.
    """
    files: dict[str, bytes] = {}
    reports = []
    for suite, records in by_suite.items():
        files.update(report_files(suite, records))
        reports.append(folder / f"{file_name(suite)}.md")
    if papers:
        files["papers.md"] = _papers(by_suite).encode()
        reports.append(folder / "papers.md")
    write_files(folder, files)
    return reports


def report_files(suite: str, records: Sequence[Record]) -> dict[str, bytes]:
    """Return file name -> contents of a suite's report: its plots, then its markdown.

    Errors: MembenchError when there are no records.
    """
    if not records:
        raise MembenchError(f"no records to report on for {suite}: run membench run first")
    files: dict[str, bytes] = {}
    text = [f"# {escaped(suite)}", _HEAD]
    tables = make_tables(records)
    for table, plot in zip(tables, plot_names(suite, tables), strict=True):
        for kind in _PLOTS:
            files[f"{plot}.{kind}"] = _picture(table, kind)
        text += _table_text(suite, table, plot)
    files[f"{file_name(suite)}.md"] = ("\n\n".join(text) + "\n").encode()
    return files


def _picture(table: Table, kind: Literal["png", "svg"]) -> bytes:
    """Draw bars of what cases take, or, where a table is about sizes, lines against size."""
    from bench.report import plots, scaling_plot

    if compared_by_size(table):
        return scaling_plot.plot_scaling(table, kind)
    return plots.plot_table(table, kind)


def _table_text(suite: str, table: Table, plot: str) -> list[str]:
    """Return the paragraphs of one table."""
    title = table_title(table)
    return [
        f"## {escaped(title)}",
        escaped(made_with(table)) + ".",
        *_overview(table),
        "\n".join(f"- {escaped(note)}" for note in notes(table)),
        f"![{escaped(title)}]({plot}.png)",
        f"The same plot as [SVG]({plot}.svg).",
        "### All figures",
        f"All {table.evidence}; {_PEAKS_NOTE}",
        markdown_table(figures_grid(table), left=4),
        "### Parts of the GPU memory",
        f"All {table.evidence}; {_PARTS_NOTE}",
        markdown_table(parts_grid(table), left=2),
        *_unfinished(table),
        "### Make it again",
        "```sh\n" + "\n".join(commands(suite, table)) + "\n```",
        "### Environment",
        markdown_table(environment_grid(table), left=2),
    ]


def _overview(table: Table) -> list[str]:
    """Return the table as a paper has it; of many sizes, their lines and limits instead."""
    if compared_by_size(table):
        return scaling_text(table)
    return [
        f"Each cell: **ours** ({table.evidence}), its ratio, and below it the paper's figure.",
        markdown_table(paper_grid(table), left=1),
    ]


def _unfinished(table: Table) -> list[str]:
    """Return why cases have no figures, and why others do not fit."""
    paragraphs = []
    for heading, statuses in (("Not run to the end", UNFINISHED), ("Does not fit", ("oom",))):
        records = [row.record for row in table.rows if row.record.status in statuses]
        lines = [f"- `{r.case}`: {r.status}: {escaped(r.reason)}" for r in records]
        paragraphs += [f"### {heading}", "\n".join(lines)] if lines else []
    return paragraphs


def commands(suite: str, table: Table) -> list[str]:
    """Return the commands that give these records again."""
    record = table.first
    command = f"membench run {shlex.quote(suite)}"
    if record.evidence == "measured":
        command += " --device cuda"
        command += f" --card {record.capped_to}" if record.capped_to else ""
    else:
        command += f" --device predict --card {record.card or NONE}"
    if any(row.record.volumes for row in table.rows):
        command += " --volumes DIR"
    settings = record.environment.allocator_settings
    if settings:
        command = f"PYTORCH_ALLOC_CONF={shlex.quote(settings)} {command}"
    return [command, "membench report my-results"]


def _plot_name(suite: str, table: Table) -> str:
    record = table.first
    capped = f"-capped-to-{record.capped_to}" if record.capped_to else ""
    return file_name(f"{suite}.{record.card or 'card'}{capped}.{record.evidence}")


def plot_names(suite: str, tables: Sequence[Table]) -> list[str]:
    """Name the plots; those that would share a name, as of two versions of torch, are numbered."""
    names: list[str] = []
    for table in tables:
        name = taken = _plot_name(suite, table)
        number = 2
        while taken in names:
            taken, number = f"{name}-{number}", number + 1
        names.append(taken)
    return names


def _papers(by_suite: Mapping[str, Sequence[Record]]) -> str:
    from bench.report.papers import papers_text

    plots = {suite: plot_names(suite, make_tables(records)) for suite, records in by_suite.items()}
    return papers_text(by_suite, plots, _HEAD)


def file_name(name: str) -> str:
    """Return a name that is a file's on every system and needs no quoting in a link."""
    return re.sub(r"[^A-Za-z0-9._+-]", "-", name)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files, or none of them: each beside its place first, then all are renamed.

    Errors: MembenchError when the folder cannot be written.
    """
    waiting = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place, aside in waiting.items():
            aside.write_bytes(files[place.name])
        for place, aside in waiting.items():
            aside.replace(place)
    except OSError as error:
        raise MembenchError(
            f"cannot write reports to {folder}: {error.strerror or error}; "
            "choose another folder with --output"
        ) from None
    finally:
        for aside in waiting.values():
            _discard(aside)


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # its folder is no folder, so it never came to be
        return
