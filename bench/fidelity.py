"""How far predictions are from measurements: every measured case predicted again, for its card.

The prediction is made from the record's own ``definition``, at the capacity and with the allocator
settings that it was measured with. Errors are predicted over measured, less 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.calibrate.wanted import NEVER_CALIBRATED
from bench.case import Case
from bench.errors import MembenchError
from bench.predict.calibration import read_calibration
from bench.predict.cards import Card, find_card
from bench.record import Environment, Record, read_records
from bench.runner import Backend, Progress, Run, TimeLimit, run_cases

__all__ = [
    "CAUSES",
    "MARGIN",
    "QUANTITIES",
    "Causes",
    "Compared",
    "Fidelity",
    "Predicting",
    "Quantity",
    "Spread",
    "card_of",
    "compare",
    "measured_records",
    "spread",
]

Quantity = Literal["requested", "allocated", "reserved", "process"]
QUANTITIES: tuple[Quantity, ...] = ("requested", "allocated", "reserved", "process")
CAUSES = ("tensors", "workspace", "allocator", "context")
MARGIN = 0.02
"""What is stated beside a prediction: a case above it by more than this is under-estimated."""

_NO_TIME = "no time was left to predict it"
_FIELDS: dict[Quantity, str] = {
    "requested": "peak_requested_bytes",
    "allocated": "peak_allocated_bytes",
    "reserved": "peak_reserved_bytes",
    "process": "process_bytes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Causes:
    """Predicted less measured bytes, by what they are made of; None where a side does not say."""

    tensors: int | None
    workspace: int | None
    allocator: int | None
    context: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A case measured and predicted. ``remarks``: what else differs, such as torch's version."""

    measured: Record
    predicted: Record
    heldout: bool
    remarks: tuple[str, ...] = ()

    def error(self, quantity: Quantity) -> float | None:
        """Return predicted over measured less 1; None where one of the two is not known."""
        field = _FIELDS[quantity]
        measured, predicted = getattr(self.measured, field), getattr(self.predicted, field)
        if predicted is None or not measured:
            return None
        return float(predicted / measured - 1)

    def causes(self) -> Causes:
        """Split the difference by cause.

        A GPU's allocator cannot tell workspaces from tensors. What of the allocated bytes'
        difference could be workspace counts as such: all of it where too little was predicted for
        a case with workspaces, else as much as the workspace that was predicted.
        """
        ours, theirs = self.predicted.parts, self.measured.parts
        difference = _less(self.predicted.peak_allocated_bytes, self.measured.peak_allocated_bytes)
        workspace: int | None = None
        if difference is not None:
            held = ours.workspace_bytes or 0
            workspace = min(difference, held) if held else 0
        return Causes(
            tensors=_less(difference, workspace),
            workspace=workspace,
            allocator=_less(ours.allocator_bytes, theirs.allocator_bytes),
            context=_less(ours.context_bytes, theirs.context_bytes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return one line of ``--json``."""
        errors = {f"error_{q}": self.error(q) for q in QUANTITIES}
        return {
            "case": self.measured.case,
            "suite": self.measured.environment.suite,
            "card": self.measured.card,
            "capped_to": self.measured.capped_to,
            "heldout": self.heldout,
            **errors,
            "causes_bytes": dataclasses.asdict(self.causes()),
            "remarks": list(self.remarks),
        }


def _less(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one - other


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """All that was compared.

    ``agreed_oom``: cases that ran out of memory on both sides. ``differing``: the two sides'
    records where one fits and the other does not. ``not_predicted``: case and why.
    """

    compared: tuple[Compared, ...]
    agreed_oom: tuple[str, ...] = ()
    differing: tuple[tuple[Record, Record], ...] = ()
    not_predicted: tuple[tuple[str, str], ...] = ()

    @property
    def left(self) -> int:
        """How many cases there was no time for."""
        return sum(why == _NO_TIME for _, why in self.not_predicted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Errors of one quantity over some cases. Shares are fractions of the cases."""

    cases: int
    median_size: float  # of the error without its sign
    lowest: float
    highest: float
    under: float  # share of cases predicted lower than measured
    under_margin: float  # and by more than MARGIN


def spread(compared: Iterable[Compared], quantity: Quantity) -> Spread | None:
    """Return the errors' spread; None where no case has both figures."""
    errors = [e for one in compared if (e := one.error(quantity)) is not None]
    if not errors:
        return None
    return Spread(
        cases=len(errors),
        median_size=statistics.median(map(abs, errors)),
        lowest=min(errors),
        highest=max(errors),
        under=sum(e < 0 for e in errors) / len(errors),
        under_margin=sum((1 + e) * (1 + MARGIN) < 1 for e in errors) / len(errors),
    )


def measured_records(by_suite: dict[str, list[Record]], given: Sequence[Path]) -> list[Record]:
    """Return the measured records among all; raises MembenchError where there is none."""
    records = [r for rs in by_suite.values() for r in rs if r.evidence == "measured"]
    if not records:
        count = sum(map(len, by_suite.values()))
        raise MembenchError(
            f"no measured record in {', '.join(map(str, given))}: all {count} are predicted; "
            "measure on a GPU with membench run SUITE --device cuda"
        )
    return records


# -- predicting again ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicting:
    """How the cases are predicted again.

    ``kept``: a folder in which predictions are kept, and found by the next comparison that would
    make them alike. ``limit``: cases that it leaves no time for are not compared.
    """

    kept: Path | None = None
    limit: TimeLimit | None = None


def compare(
    records: Sequence[Record],
    on_progress: Callable[[Progress], None] = lambda _: None,
    how: Predicting | None = None,
) -> Fidelity:
    """Predict every measured record's case for its card, and compare.

    Raises MembenchError where predictions cannot be kept in the folder given.
    """
    how = how or Predicting()
    if how.kept is not None:
        try:
            how.kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MembenchError(
                f"cannot keep predictions in {how.kept}: {error.strerror or error}; "
                "choose another folder with --keep"
            ) from None
    compared: list[Compared] = []
    agreed: list[str] = []
    differing: list[tuple[Record, Record]] = []
    missing = [
        (r.case, f"measured {r.status}: {r.reason}")
        for r in records
        if r.status not in ("ok", "oom")
    ]
    groups: defaultdict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        if record.status in ("ok", "oom"):
            try:
                Case.from_definition(record.definition)
            except MembenchError as error:
                missing.append((record.case, str(error)))
                continue
            settings = record.environment.allocator_settings
            capacity = record.capacity_bytes if record.capped_to else None
            groups[(record.card, record.capped_to, capacity, settings)].append(record)
    for group in groups.values():
        try:
            card, pairs = _predicted(group, on_progress, how)
        except MembenchError as error:
            missing += [(record.case, str(error)) for record in group]
            continue
        for measured, predicted in pairs:
            if predicted is None:
                missing.append((measured.case, _NO_TIME))
            elif predicted.status not in ("ok", "oom"):
                missing.append((measured.case, f"predicted {predicted.status}: {predicted.reason}"))
            elif measured.status != predicted.status:
                differing.append((measured, predicted))
            elif measured.status == "oom":
                agreed.append(measured.case)
            else:
                compared.append(_compared(measured, predicted, card))
    return Fidelity(
        compared=tuple(compared),
        agreed_oom=tuple(agreed),
        differing=tuple(differing),
        not_predicted=tuple(missing),
    )


def card_of(record: Record) -> Card:
    """Return the card that a record was measured on, with the capacity that it was given.

    Raises MembenchError where the record names no card, or one that is not known.
    """
    if record.card is None:
        raise MembenchError(f"the record of {record.case} names no card")
    card = find_card(record.card)
    if record.capped_to is None:
        return card
    capacity = record.capacity_bytes or find_card(record.capped_to).capacity_bytes
    return dataclasses.replace(card, memory_bytes=capacity + card.context_bytes)


def _predicted(
    records: Sequence[Record], on_progress: Callable[[Progress], None], how: Predicting
) -> tuple[Card, list[tuple[Record, Record | None]]]:
    """Predict cases of one card, one capacity and one setting of the allocator."""
    from bench.backends import predicted_backend
    from bench.environment import read_environment
    from bench.predict.alloc_conf import parse_alloc_conf

    card = card_of(records[0])
    settings = records[0].environment.allocator_settings
    parse_alloc_conf(settings)
    backend, _ = predicted_backend(card)
    backend = dataclasses.replace(
        backend, request={**backend.request, "allocator_settings": settings}
    )
    environment = dataclasses.replace(
        read_environment(suite=records[0].environment.suite),
        allocator_settings=settings,
        card_hash=card.digest(),
    )
    cases = {(case := Case.from_definition(r.definition)).digest(): case for r in records}
    with tempfile.TemporaryDirectory() as temporary:
        path = (how.kept or Path(temporary)) / f"{_kind(card, backend, environment)}.records"
        found = _kept(path)
        waiting = {digest: case for digest, case in cases.items() if digest not in found}
        if waiting:
            run = Run(
                cases=list(waiting.values()),
                backend=backend,
                environment=environment,
                path=path,
                limit=how.limit,
            )
            made = run_cases(run, on_progress)
            digests = list(waiting) if len(made) == len(waiting) else [_digest(r) for r in made]
            found |= zip(digests, made, strict=True)
    return card, [(record, found.get(_digest(record))) for record in records]


def _digest(record: Record) -> str:
    return Case.from_definition(record.definition).digest()


def _kind(card: Card, backend: Backend, environment: Environment) -> str:
    """Return a name for all predictions that are made alike: same card, software and settings."""
    own = (environment.membench, environment.commit, environment.torch, backend.tracer)
    text = repr((card.name, card.digest(), card.memory_bytes, environment.allocator_settings, own))
    return f"{card.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _kept(path: Path) -> dict[str, Record]:
    """Return the predictions of a file that ended, by their case's digest."""
    kept = read_records(path) if path.exists() else iter(())
    return {_digest(record): record for record in kept if record.status in ("ok", "oom")}


def _compared(measured: Record, predicted: Record, card: Card) -> Compared:
    return Compared(
        measured=measured,
        predicted=predicted,
        heldout=_is_held_out(measured, predicted),
        remarks=tuple(_remarks(measured, predicted, card)),
    )


def _is_held_out(measured: Record, predicted: Record) -> bool:
    """Whether calibration never saw the case: its suite's networks, or one of its shapes."""
    rests_on = ("context", "convolution workspace")
    return Path(measured.environment.suite or "").stem in NEVER_CALIBRATED or any(
        part.startswith(rests_on) for part in predicted.uncalibrated
    )


def _remarks(measured: Record, predicted: Record, card: Card) -> Iterable[str]:
    if measured.capped_to is not None:
        yield f"capped to {measured.capped_to}"
    theirs, ours = measured.environment, predicted.environment
    if theirs.torch and ours.torch and theirs.torch.split("+")[0] != ours.torch.split("+")[0]:
        yield f"torch {theirs.torch} measured, {ours.torch} predicted"
    if predicted.tracer == "cpu":
        yield "traced on the CPU"
    calibration = read_calibration(card.calibration, card.name)
    if calibration is None:
        yield f"{card.name} is not calibrated"
        return
    for one in calibration.versions.differences(theirs.torch, theirs.cudnn, theirs.driver):
        yield f"calibrated with {one.replace(', here', ', measured with')}"
    if predicted.uncalibrated:
        yield f"rests on {', '.join(predicted.uncalibrated)}"
