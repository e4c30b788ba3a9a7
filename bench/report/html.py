"""A suite's records as one HTML page that holds all it shows: no address in it is ever asked for.

The page forbids itself every request, has its style, its script and its pictures inside, and reads
without the script, in the dark and on paper.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import count

from bench.errors import MembenchError
from bench.record import Record
from bench.report.cells import made_with, notes, table_title
from bench.report.grids import environment_grid, figures_grid, paper_grid, parts_grid
from bench.report.html_tables import html_table
from bench.report.markdown import UNFINISHED, commands
from bench.report.markup import HTML
from bench.report.picture_files import inline_svg
from bench.report.pictures import Picture, table_pictures
from bench.report.rows import Table, make_tables
from bench.report.scaling import compared_by_size, scaling_grid, scaling_series

__all__ = ["page_text"]

_PEAKS_NOTE = (
    "requested, allocated and reserved are the allocator's peaks; one with > is where the run "
    "ended for want of memory."
)
_PARTS_NOTE = (
    "the parts add up to the GPU memory of the process; where no workspace is named, the tensors' "
    "part holds it."
)
_MOST_DRAWN = 5  # tables with pictures on a page; more would take minutes, and nobody's eye
_NOT_DRAWN = (
    '<p class="about">No pictures: this page has many tables, and only the first ones have them. '
    "Report this card's records alone to see its pictures.</p>"
)
_MOST_LISTED = 200  # cases that did not end, before the rest are only counted


def page_text(suite: str, records: Sequence[Record]) -> str:
    """Return the page of a suite's records; equal records give an equal page.

    Errors: MembenchError when there are no records.
    """
    if not records:
        raise MembenchError(f"no records to report on for {suite}: run membench run first")
    tables = make_tables(records)
    numbers = count(1)
    body = [_header(suite, tables), "<main>"]
    for number, table in enumerate(tables, start=1):
        body.append(f'<section id="table-{number}">')
        body += _table(suite, table, numbers, drawn=number <= _MOST_DRAWN)
        body.append("</section>")
    body.append("</main>")
    return _page(suite, "\n".join(body))


def _page(suite: str, body: str) -> str:
    style, script = (
        files("bench.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(suite)}: GPU memory</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _header(suite: str, tables: Sequence[Table]) -> str:
    rows = [row for table in tables for row in table.rows]
    measured = sum(row.record.evidence == "measured" for row in rows)
    unfit = sum(row.record.status == "oom" for row in rows)
    ended = sum(row.record.status in UNFINISHED for row in rows)
    cases = "case" if len(rows) == 1 else "cases"
    words = [f"{len(rows):,} {cases}: {measured:,} measured, {len(rows) - measured:,} predicted"]
    words += [f"{unfit:,} do not fit their card"] if unfit else []
    words += [f"{ended:,} did not run to the end"] if ended else []
    links = "".join(
        f'<li><a href="#table-{number}">{escape(table_title(table))}</a></li>'
        for number, table in enumerate(tables, start=1)
    )
    contents = f'<nav aria-label="tables"><ul>{links}</ul></nav>' if len(tables) > 1 else ""
    return (
        f"<header><h1>{escape(suite)}</h1>\n<p>{'; '.join(words)}.</p>\n"
        '<p class="about">Made by membench report from records. Measured is solid or filled, '
        f"predicted is hatched, dashed or hollow, in every picture.</p>{contents}</header>"
    )


def _table(suite: str, table: Table, numbers: Iterator[int], *, drawn: bool) -> list[str]:
    """Return the parts of the page about one table."""
    kind = table.first.evidence
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes(table))
    again = escape("\n".join(commands(suite, table)))
    return [
        f'<h2>{escape(table_title(table))} <span class="evidence {kind}">{kind}</span></h2>',
        f'<p class="about">{escape(made_with(table))}.</p>',
        _overview(table),
        f'<ul class="notes">{listed}</ul>',
        *(_figures(table, numbers) if drawn else [_NOT_DRAWN]),
        "<h3>All figures</h3>",
        html_table(figures_grid(table, HTML), 4, f"All {table.evidence}; {_PEAKS_NOTE}"),
        "<h3>Parts of the GPU memory</h3>",
        html_table(parts_grid(table, HTML), 2, f"All {table.evidence}; {_PARTS_NOTE}"),
        *_unfinished(table),
        "<h3>Make it again</h3>",
        f"<pre><code>{again}</code></pre>",
        "<h3>Environment</h3>",
        html_table(environment_grid(table, HTML), 2, "What shaped the records.", sortable=False),
    ]


def _overview(table: Table) -> str:
    if compared_by_size(table):
        grid = scaling_grid(scaling_series(table), HTML)
        return html_table(grid, 2, f"Largest input of each size of card, {table.evidence}.")
    caption = f"Each cell: ours ({table.evidence}), its ratio, and below it the paper's figure."
    return html_table(paper_grid(table, HTML), 1, caption)


def _figures(table: Table, numbers: Iterator[int]) -> Iterator[str]:
    for picture in table_pictures(table):
        yield _figure(picture, next(numbers))


def _figure(picture: Picture, number: int) -> str:
    head = f"<h3>{escape(picture.title)}</h3>"
    if picture.draw is None:
        return f'{head}\n<p class="about">{escape(picture.caption)}</p>'
    drawing = inline_svg(picture.draw, number, picture.alt)
    return (
        f'{head}\n<figure><div class="scroll" tabindex="0" role="group" '
        f'aria-label="{escape(picture.title)}">{drawing}</div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _unfinished(table: Table) -> Iterator[str]:
    """Yield why cases have no figures, and why others do not fit."""
    for heading, statuses in (("Not run to the end", UNFINISHED), ("Does not fit", ("oom",))):
        records = [row.record for row in table.rows if row.record.status in statuses]
        if not records:
            continue
        lines = [
            f"<li><code>{escape(r.case)}</code>: {escape(r.status)}: {escape(r.reason)}</li>"
            for r in records[:_MOST_LISTED]
        ]
        if len(records) > _MOST_LISTED:
            lines.append(f"<li>and {len(records) - _MOST_LISTED:,} more, named in the tables</li>")
        yield f"<h3>{heading}</h3>\n<ul>{''.join(lines)}</ul>"
