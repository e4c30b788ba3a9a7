"""Records as rows of a table: what is compared with what, in bytes, before any text.

A table holds records made alike: one suite, card, cap, evidence, tracer, torch and allocator
setting. A measured figure is therefore never divided by a predicted one. A section of it holds one
network at one shape, mode and batch size: the rows that a ratio to the baseline may compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.case import PaperFigure, known_fields
from bench.record import Record
from bench.report.results import suite_name

__all__ = ["Agreement", "Ratio", "Row", "Section", "Table", "evidence_text", "make_tables"]

BASELINE = "baseline"

Agreement = Literal["agrees", "disagrees"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A quotient of bytes; ``by_needs`` when it is of what cases need, not of what they used."""

    value: float
    by_needs: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A record beside the record that it is compared with (None: there is none)."""

    record: Record
    baseline: Record | None

    @property
    def used_bytes(self) -> int | None:
        """What the process held: allocator's reserved peak and context. None unless ``ok``."""
        return self.record.process_bytes if self.record.status == "ok" else None

    @property
    def needs_bytes(self) -> int | None:
        """The memory of the smallest card on which the case completes, context included."""
        return _needs_of_card(self.record)

    @property
    def figure_bytes(self) -> int | None:
        """What the case used, or, where it does not fit, what it needs."""
        return self.needs_bytes if self.record.status == "oom" else self.used_bytes

    @property
    def card_bytes(self) -> int | None:
        """The card's memory: what the allocator may use, and the context."""
        return _with_context(self.record, self.record.capacity_bytes)

    @property
    def ratio(self) -> Ratio | None:
        """This row's figure over the baseline's, both of one kind."""
        if self.baseline is None:
            return None
        ours, theirs = self.used_bytes, Row(self.baseline, None).used_bytes
        if ours is not None and theirs:
            return Ratio(ours / theirs, by_needs=False)
        ours, theirs = self.needs_bytes, _needs_of_card(self.baseline)
        if ours is not None and theirs:
            return Ratio(ours / theirs, by_needs=True)
        return None

    @property
    def paper(self) -> PaperFigure | None:
        """The figure that the paper prints for this case."""
        paper = self.record.definition.get("paper")
        return PaperFigure(**known_fields(PaperFigure, paper)) if paper else None

    @property
    def of_paper(self) -> Ratio | None:
        """Our figure over the paper's, where the paper prints a value."""
        if self.paper is None or self.paper.relation == ">" or self.figure_bytes is None:
            return None
        return Ratio(self.figure_bytes / self.paper.bytes, by_needs=self.record.status == "oom")

    @property
    def agreement(self) -> Agreement | None:
        """Whether we too are above a figure that the paper prints as "more than".

        A case that does not fit and whose needs are not known takes more than the card has; that
        settles it only if the card has as much as the paper's figure.
        """
        if self.paper is None or self.paper.relation != ">":
            return None
        if self.figure_bytes is not None:
            return "agrees" if self.figure_bytes > self.paper.bytes else "disagrees"
        above = self.record.status == "oom" and (self.card_bytes or 0) >= self.paper.bytes
        return "agrees" if above else None


@dataclass(frozen=True, slots=True)
class Section:
    """One network at one shape, mode and batch size."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Record:
        """A record that stands for what all of the section share."""
        return self.rows[0].record


@dataclass(frozen=True, slots=True)
class Table:
    """Records made alike, by section, in the order of the suite."""

    suite: str
    sections: tuple[Section, ...]

    @property
    def first(self) -> Record:
        """A record that stands for what all of the table share."""
        return self.sections[0].first

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all sections."""
        return tuple(row for section in self.sections for row in section.rows)

    @property
    def baselines(self) -> tuple[str, ...]:
        """The variants that ratios are taken to: one, unless networks have different ones."""
        return tuple(dict.fromkeys(row.baseline.variant for row in self.rows if row.baseline))

    @property
    def evidence(self) -> str:
        """Return ``measured``, or ``predicted`` and what traced it."""
        return evidence_text(self.first)


def evidence_text(record: Record) -> str:
    """Return ``measured``, or ``predicted`` and what traced it: ``predicted (cuda-shim)``."""
    if record.evidence == "measured":
        return "measured"
    return f"predicted ({record.tracer or 'tracer not recorded'})"


def make_tables(records: Iterable[Record]) -> list[Table]:
    """Return one table for each way the records were made, in order of first appearance."""
    by_origin: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        by_origin.setdefault(_origin(record), []).append(record)
    by_torch: dict[tuple[object, ...], list[Record]] = {}
    for origin, alike in by_origin.items():
        known = next((r.environment.torch for r in alike if r.environment.torch), None)
        for record in alike:  # a case that died before it could say its torch stays with the others
            by_torch.setdefault((origin, record.environment.torch or known), []).append(record)
    return [_table(alike) for alike in by_torch.values()]


def _origin(record: Record) -> tuple[object, ...]:
    """All that must be equal for figures to be comparable, but torch's version."""
    return (
        suite_name(record),
        record.evidence,
        record.card,
        record.capped_to,
        record.tracer,
        record.environment.allocator_settings,
    )


def _table(records: Sequence[Record]) -> Table:
    ordered = sorted(records, key=lambda record: record.definition.get("position", 0))
    baselines = _baseline_variants(ordered)
    sections: dict[tuple[object, ...], list[Record]] = {}
    for record in ordered:
        sections.setdefault(_compared(record), []).append(record)
    return Table(
        suite_name(ordered[0]),
        tuple(_section(alike, baselines[alike[0].network]) for alike in sections.values()),
    )


def _compared(record: Record) -> tuple[object, ...]:
    return (
        record.network,
        record.requested_shape,
        record.shape,
        record.mode,
        record.batch_size,
    )


def _baseline_variants(records: Sequence[Record]) -> dict[str, str]:
    """Return network -> the suite's baseline variant; else one named ``baseline``, or the first."""
    baselines: dict[str, str] = {}
    for record in records:
        named = record.definition.get("baseline")
        if named is not None:
            baselines[record.network] = named
        elif record.variant == BASELINE:
            baselines[record.network] = BASELINE
        else:
            baselines.setdefault(record.network, record.variant)
    return baselines


def _section(records: Sequence[Record], baseline_variant: str) -> Section:
    baseline = next((r for r in records if r.variant == baseline_variant), None)
    return Section(tuple(Row(record, baseline) for record in records))


def _needs_of_card(record: Record) -> int | None:
    """Return None too for a case that did not run to its end: it says nothing about needs."""
    known = record.status in ("ok", "oom")
    return _with_context(record, record.needs_bytes) if known else None


def _with_context(record: Record, allocator_bytes: int | None) -> int | None:
    """Add what the process holds outside the allocator; None if either is not known."""
    context = record.parts.context_bytes
    return None if allocator_bytes is None or context is None else allocator_bytes + context
