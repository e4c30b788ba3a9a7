"""What a comparison needs of a record: its figures, where they come from, who holds the bytes.

A results file and a baseline file give the same, so either can stand on either side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.errors import MembenchError
from bench.globs import Globs, choose
from bench.record import Holder, Record, Status
from bench.report.results import read_results

__all__ = [
    "ORIGIN_FIELDS",
    "Figures",
    "Origin",
    "figures_of",
    "read_results_figures",
    "select",
]

# Of a case's definition, what shapes no figure of memory.
_ASIDE = (
    *("paper", "volumes", "baseline", "position", "time_limit_s", "case"),
    *("paper_time", "paper_flops"),
    *("schedule", "schedule_options"),  # they set numbers alone
)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Origin:
    """All that must be alike before two figures can be compared; "" is not known, or none."""

    suite: str
    card: str = ""
    capped_to: str = ""
    evidence: str
    tracer: str = ""
    torch: str = ""
    cudnn: str = ""
    allocator_settings: str = ""
    suite_hash: str = ""
    card_hash: str = ""
    schema_version: int


ORIGIN_FIELDS = tuple(f.name for f in dataclasses.fields(Origin))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one case gave. Bytes are whole numbers; ``time_s`` is the median step; None: not known.

    ``definition_hash``: of the case's definition, without what shapes no figure.
    """

    case: str
    origin: Origin
    status: Status
    reason: str = ""
    definition_hash: str = ""
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    process_bytes: int | None = None
    needs_bytes: int | None = None
    time_s: float | None = None
    holders: tuple[Holder, ...] = ()

    @property
    def title(self) -> str:
        """``fcn/baseline/96x96x96/train on v100-32gb, predicted``."""
        card = self.origin.card or "an unknown card"
        capped = f" capped to {self.origin.capped_to}" if self.origin.capped_to else ""
        return f"{self.case} on {card}{capped}, {self.origin.evidence}"


def read_results_figures(paths: Sequence[Path]) -> list[Figures]:
    """Return the figures of the last record of each case in result files and folders.

    Errors: MembenchError, as ``read_results`` raises it, and when every file is empty of cases.
    """
    by_suite = read_results(paths)
    return [figures_of(record, suite) for suite, records in by_suite.items() for record in records]


def figures_of(record: Record, suite: str) -> Figures:
    """Return what a comparison needs of ``record``, which belongs to ``suite``."""
    made = record.environment
    return Figures(
        case=record.case,
        origin=Origin(
            suite=suite,
            suite_hash=made.suite_hash or "",
            evidence=record.evidence,
            tracer=record.tracer or "",
            card=record.card or "",
            capped_to=record.capped_to or "",
            card_hash=made.card_hash or "",
            torch=made.torch or "",
            cudnn=made.cudnn or "",
            allocator_settings=made.allocator_settings,
            schema_version=record.schema_version,
        ),
        status=record.status,
        reason=record.reason,
        definition_hash=_definition_hash(record.definition),
        peak_allocated_bytes=record.peak_allocated_bytes,
        peak_reserved_bytes=record.peak_reserved_bytes,
        process_bytes=record.process_bytes,
        needs_bytes=record.needs_bytes,
        time_s=statistics.median(record.step_times_s) if record.step_times_s else None,
        holders=record.peak_holders,
    )


def select(figures: Iterable[Figures], case: Globs, suite: str | None, where: str) -> list[Figures]:
    """Return those whose case matches a glob of ``case`` and whose suite is ``suite``.

    Raises MembenchError when there are some, and a glob matches none; ``where`` says of what.
    """
    every = list(figures)
    of_suite = [one for one in every if suite is None or one.origin.suite == suite]
    left, missing = choose(of_suite, case, lambda one: (one.case,))
    if every and (missing is not None or not left):
        asked = " of ".join(
            text for text in (missing and f"case {missing!r}", suite and f"suite {suite!r}") if text
        )
        known = ", ".join(sorted({one.case for one in every})[:5])
        raise MembenchError(f"no {asked} in {where}: it has {len(every)} cases, as {known}")
    return left


def _definition_hash(definition: dict[str, Any]) -> str:
    """Return a short hash of what differs from a plain case: a new field with a default is none."""
    defaults = _case_defaults()
    shaping = {
        name: value
        for name, value in definition.items()
        if name not in _ASIDE and not (name in defaults and defaults[name] == value)
    }
    text = json.dumps(shaping, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _case_defaults() -> dict[str, Any]:
    """Return each optional field of a case with its default, as JSON gives it."""
    plain = Case(network="", variant="", requested_shape=(), shape=()).to_definition()
    required = ("network", "variant", "requested_shape", "shape")
    return {name: value for name, value in plain.items() if name not in required}
