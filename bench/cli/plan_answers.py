"""What a plan answers, of one shape or of a folder of volumes, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.cli.console import out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.plan.folder_plan import FolderPlan, FolderProposal
    from bench.plan.search import Plan, Proposal
    from bench.predict.cards import Card

__all__ = ["Answer", "of_folder", "of_shape", "print_answer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A plan's answer, ready to be printed and written."""

    title: str
    card: Card
    data: list[dict[str, Any]]  # for JSON
    rows: Sequence[tuple[Proposal, tuple[str, ...]]]  # with the cells that a folder adds
    headings: tuple[str, ...]  # of those cells
    usable: Sequence[Proposal]  # at shapes where they fit, the best first
    fits: bool
    lines: Sequence[str]


def of_shape(plan: Plan, lines: Sequence[str]) -> Answer:
    """Return the answer for one shape; ``lines``: what to say where nothing fits."""
    return Answer(
        title=f"{_what(plan)}: {len(plan.fitting)} of {len(plan.proposals)} combinations fit",
        card=plan.card,
        data=[proposal.to_dict() for proposal in plan.proposals],
        rows=[(proposal, ()) for proposal in plan.fitting],
        headings=(),
        usable=plan.fitting,
        fits=bool(plan.fitting),
        lines=lines,
    )


def of_folder(found: FolderPlan) -> Answer:
    """Return the answer for a folder of volumes, and what may be done where not all of them fit."""
    from bench.cli.volume_lines import volume_name
    from bench.plan.remedies import nearest_lines

    folder = found.folder
    if found.fitting:
        shown = [one for one in found.proposals if one.proposal.fits]
    else:
        shown = [one for one in found.proposals if one.share is not None]
    lines = [f"worst of {folder.total} volumes: {volume_name(found.worst)}"]
    if not found.fitting:
        lines.append(f"no combination is known to make all of the {folder.total} volumes fit")
        lines += nearest_lines(found.plan)
    unknown = sum(one.share is None for one in found.proposals)
    if unknown:
        lines.append(f"of {unknown} combinations the other volumes were not simulated")
    return Answer(
        title=f"{_what(found.plan)}, the worst of {folder.total} volumes: "
        f"with {len(found.fitting)} of {len(found.proposals)} combinations all fit",
        card=found.plan.card,
        data=[one.to_dict() for one in found.proposals],
        rows=[(one.proposal, _cells(one)) for one in shown],
        headings=("volumes fit", "patch for the rest")[: 1 if found.fitting else 2],
        usable=[one.proposal if one.fits_all else one.at_patch() for one in found.usable],
        fits=bool(found.fitting),
        lines=lines,
    )


def print_answer(answer: Answer, *, top: int, code: bool) -> None:
    """Print the table, what stands below it, and the lines of Python if they were asked for."""
    if answer.rows:
        out().print(_table(answer, answer.rows[: top or None]))
        more = len(answer.rows) - len(answer.rows[: top or None])
        if more:
            which = "more fit" if answer.fits else "more"
            out().print(f"{more} {which}: --top 0 or --json shows them", markup=False)
        out().print(
            "Predicted. slowdown: of a step, over the same network at the same precision with "
            "everything kept; estimated from FLOPs and bytes moved, unless marked measured.",
            soft_wrap=True,
            markup=False,
        )
    for line in answer.lines:
        out().print(line, soft_wrap=True, markup=False)
    if code and answer.usable:
        from bench.plan.code_text import code_text

        print()
        print(code_text(answer.usable[0].case), end="")


def _what(plan: Plan) -> str:
    first = plan.proposals[0].case
    sides = "x".join(map(str, first.shape))
    return f"{first.network} at {sides}, {first.mode}, on {plan.card.name}"


def _cells(one: FolderProposal) -> tuple[str, ...]:
    if one.share is None:
        return (f"at least {one.least_fitting} of {one.total}", "-")
    patch = "x".join(map(str, one.patch.case.shape)) if one.patch is not None else "-"
    return (f"{one.share.fitting} of {one.total}", patch)


def _table(answer: Answer, rows: Sequence[tuple[Proposal, tuple[str, ...]]]) -> Any:
    from rich.table import Table

    from bench.units import format_bytes

    table = Table(title=answer.title, title_justify="left")
    table.add_column("proposal", overflow="fold")
    table.add_column("precision")
    table.add_column("exact")
    for heading in ("peak reserved", "process", "headroom", "slowdown", *answer.headings):
        table.add_column(heading, justify="right")
    for proposal, cells in rows:
        slowdown = "-" if proposal.slowdown is None else f"{proposal.slowdown:.2f}x"
        marked = " measured" if proposal.slowdown_evidence == "measured" else ""
        table.add_row(
            proposal.case.variant,
            proposal.case.precision,
            "yes" if proposal.exact else "no",
            format_bytes(proposal.peak_reserved_bytes),
            format_bytes(proposal.process_bytes),
            format_bytes(proposal.headroom_bytes),
            slowdown + marked,
            *cells[: len(answer.headings)],
        )
    return table
