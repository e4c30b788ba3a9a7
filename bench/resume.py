"""Going on with a run: which cases its file of records has done with, and which come first.

Cases without any record come before those that were tried and did not end, so that one that fits
into no run's time limit keeps no other from being run. After two time limits in a row such a run
has done with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from bench.case import Case, definition_digest
from bench.record import Record, read_records
from bench.runner import Run

__all__ = ["finished_cases", "untried_first"]

_GIVEN_UP_AFTER = 2  # time limits in a row


def finished_cases(run: Run) -> dict[str, Record]:
    """Return the records in the run's file that need not be made again, by case name.

    A case is finished when its last record is ``ok`` or ``oom``, was made from the same
    definition, by the same membench, torch, tracer and allocator settings, and for a card whose
    data are the same. Where the run has a time limit, one whose last two records are such
    ``timeout``s is finished too.
    """
    if not run.path.exists():
        return {}
    digests = {case.name: case.digest() for case in run.cases}
    records: defaultdict[str, list[Record]] = defaultdict(list)
    for record in read_records(run.path):
        if record.case in digests:
            records[record.case].append(record)

    def stands(record: Record) -> bool:
        digest = definition_digest(record.definition)
        return digest == digests[record.case] and _made_alike(record, run)

    finished = {}
    for name, of_case in records.items():
        deciding = _deciding(of_case, run)
        if deciding and all(map(stands, deciding)):
            finished[name] = deciding[-1]
    return finished


def _deciding(records: Sequence[Record], run: Run) -> Sequence[Record]:
    """Return the last records of a case that could end it, none where they do not."""
    if records[-1].status in ("ok", "oom"):
        return records[-1:]
    last = records[-_GIVEN_UP_AFTER:] if run.limit is not None else ()
    given_up = len(last) == _GIVEN_UP_AFTER and all(r.status == "timeout" for r in last)
    return last if given_up else ()


def untried_first(run: Run) -> list[Case]:
    """Return the run's cases, those without any record in its file before the others."""
    tried = {record.case for record in read_records(run.path)} if run.path.exists() else set()
    return sorted(run.cases, key=lambda case: case.name in tried)


def _made_alike(record: Record, run: Run) -> bool:
    theirs, ours = record.environment, run.environment
    return (
        record.tracer == run.backend.tracer
        and record.capped_to == run.backend.capped_to
        and theirs.torch == ours.torch
        and theirs.membench == ours.membench
        and theirs.commit == ours.commit
        and theirs.allocator_settings == ours.allocator_settings
        and theirs.card_hash == ours.card_hash
    )
