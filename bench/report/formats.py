"""What ``membench report`` writes: a report for each suite in one of three formats, and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Literal

from bench.record import Record

__all__ = ["ReportFormat", "figure_files", "write_formatted"]

_KINDS: tuple[Literal["png", "svg"], ...] = ("png", "svg")
_PAPER_DPI = 300


class ReportFormat(StrEnum):
    """How a report is written."""

    MARKDOWN = "markdown"
    HTML = "html"
    LATEX = "latex"


_ENDINGS = {ReportFormat.HTML: ".html", ReportFormat.LATEX: ".tex"}


def write_formatted(
    by_suite: Mapping[str, Sequence[Record]],
    folder: Path,
    form: ReportFormat,
    *,
    papers: bool = False,
    figures: bool = False,
) -> list[Path]:
    """Write each suite's report into ``folder``; return the reports, then the figures.

    ``papers``: in markdown, ``papers.md`` too. ``figures``: every picture as PNG and SVG too.

    Errors: MembenchError when there are no records or the folder cannot be written.
    """
    from bench.report.markdown import file_name, write_files, write_reports

    made: dict[str, bytes] = {}
    reports: list[Path] = []
    if form is ReportFormat.MARKDOWN:
        reports = write_reports(by_suite, folder, papers=papers)
    else:
        text_of = _writer(form)
        for suite, records in by_suite.items():
            made[file_name(suite) + _ENDINGS[form]] = text_of(suite, records).encode()
    if figures:
        for suite, records in by_suite.items():
            made |= figure_files(suite, records)
    write_files(folder, made)
    return [*reports, *(folder / name for name in made)]


def _writer(form: ReportFormat) -> Callable[[str, Sequence[Record]], str]:
    if form is ReportFormat.HTML:
        from bench.report.html import page_text

        return page_text
    from bench.report.latex import latex_text

    return latex_text


def figure_files(suite: str, records: Sequence[Record]) -> dict[str, bytes]:
    """Return file name -> contents of every picture of a suite's tables, as PNG and as SVG.

    A file is called as its table's plot in the markdown report, and after its picture:
    ``table1.v100-32gb.predicted.timeline.svg``. PNG has 300 dots an inch.
    """
    from bench.report.markdown import plot_names
    from bench.report.picture_files import picture_bytes
    from bench.report.pictures import table_pictures
    from bench.report.rows import make_tables

    tables = make_tables(records)
    made: dict[str, bytes] = {}
    for table, name in zip(tables, plot_names(suite, tables), strict=True):
        for picture in table_pictures(table):
            for kind in _KINDS if picture.draw is not None else ():
                assert picture.draw is not None
                made[f"{name}.{picture.name}.{kind}"] = picture_bytes(
                    picture.draw, kind, _PAPER_DPI
                )
    return made
