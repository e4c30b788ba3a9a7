"""One report for all papers: a section a paper, its figures beside ours, each with its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.record import Record
from bench.report.cells import made_with, notes, table_title
from bench.report.grids import escaped, markdown_table, paper_grid
from bench.report.paper_grids import cases_grid, pocket_grid, pocket_pairs
from bench.report.rows import Table, make_tables
from bench.report.scaling import SCALING_NOTES, compared_by_size, scaling_grid, scaling_series

__all__ = ["PAPERS", "Paper", "papers_text"]

_FLOPS_NOTE = (
    "FLOPs: 2 x multiply-adds of convolutions and matrix products, counted from the operators that "
    "a step dispatches. recomputation: the step's FLOPs over those of the same step where nothing "
    "is computed twice."
)
_TIME_NOTE = "A time of ours would be measured; where none stands, no GPU has run the case."
_POCKET_NOTE = (
    "Pocket widths against full ones, saved: 1 - pocket / full. allocated: the peak of what "
    "tensors and workspaces held, without the allocator's cache and the context."
)


@dataclass(frozen=True, slots=True)
class Paper:
    """A section of the report: a heading, and the suites whose tables stand under it."""

    title: str
    suites: tuple[str, ...]
    wide: bool = False  # a column a shape, as the FCN's paper has it, and not a row a case


PAPERS = (
    Paper("Memory-efficient FCN", ("table1",), wide=True),
    Paper("Full-volume convolutional LSTM", ("cclstm",)),
    Paper("FLARE21, two stages", ("flare21",)),
    Paper("PocketNet", ("pocketnet_3d", "pocketnet_2d")),
    Paper("All networks against the size of their input", ("scaling",)),
)


def papers_text(
    by_suite: Mapping[str, Sequence[Record]], plots: Mapping[str, Sequence[str]], head: str
) -> str:
    """Return the markdown of ``papers.md``.

    ``plots`` are the plots' files without their ending, by suite, in the order of its tables;
    ``head`` is the line that says how the file was made.
    """
    text = ["# The papers' tables", head, _summary(by_suite)]
    for paper in PAPERS:
        text.append(f"## {paper.title}")
        for suite in paper.suites:
            records = by_suite.get(suite, ())
            text += _suite_text(suite, records, plots.get(suite, ()), paper.wide)
    return "\n\n".join(text) + "\n"


def _summary(by_suite: Mapping[str, Sequence[Record]]) -> str:
    """Say what evidence there is, before any figure: nobody reads on to find out."""
    shown = [r for paper in PAPERS for suite in paper.suites for r in by_suite.get(suite, ())]
    measured = sum(record.evidence == "measured" for record in shown)
    predicted = len(shown) - measured
    cases = "case" if measured == 1 else "cases"
    return (
        f"{measured} {cases} measured on a GPU, {predicted} predicted by a simulated run. Every "
        "table says which, and for which card."
    )


def _suite_text(
    suite: str, records: Sequence[Record], plots: Sequence[str], wide: bool
) -> list[str]:
    citation, note = _of_paper(suite)
    text = [f"*{escaped(citation)}*"] if citation else []
    if not records:
        return [*text, f"No records: `membench run {suite}` makes them."]
    for table, plot in zip(make_tables(records), plots, strict=True):
        text += [
            f"### {escaped(table_title(table))}",
            escaped(made_with(table)) + ".",
            *_grids(table, wide),
            f"[Plot]({plot}.png), [all figures]({suite}.md).",
        ]
        if note:
            text.append(f"About the paper's figures: {escaped(note)}")
    return text


def _of_paper(suite: str) -> tuple[str, str]:
    """Return the citation and the note of a shipped suite, "" for what it has not."""
    from bench.suite import load_suite

    found = load_suite(suite)
    return found.citation or "", found.paper_note


def _grids(table: Table, wide: bool) -> list[str]:
    if compared_by_size(table):
        grid = scaling_grid(scaling_series(table))
        about = "\n".join(f"- {escaped(line)}" for line in notes(table))
        return [markdown_table(grid, left=2), f"{SCALING_NOTES}\n{about}"]
    lines = list(notes(table))
    if wide:
        text = [markdown_table(paper_grid(table), left=1)]
    else:
        grid = cases_grid(table)
        text = [markdown_table(grid, left=2 + ("network" in grid))]
        lines += [_FLOPS_NOTE] if any(row.record.forward_flops for row in table.rows) else []
        lines.append(_TIME_NOTE)
    text.append("\n".join(f"- {escaped(line)}" for line in lines))
    pairs = list(pocket_pairs(table))
    if pairs:
        text += [_POCKET_NOTE, markdown_table(pocket_grid(pairs, table), left=2)]
    return text
