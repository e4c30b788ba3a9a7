"""The search of a plan: every combination simulated for one card, and put in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.case import Case, Precision
from bench.errors import MembenchError
from bench.plan.combinations import combined, single
from bench.plan.placed import place_for_card
from bench.plan.simulator import Simulator
from bench.plan.slowdown import predicted_slowdown
from bench.predict.cards import Card, budget_card
from bench.record import Record

__all__ = ["Plan", "Proposal", "budget_card", "make_plan"]

_SLOW = ("tiled_levels", "compress_activations")  # to trace: they run many small operators


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One combination on one card: predicted, not measured.

    Where it does not fit, ``peak_reserved_bytes`` is the least that the caching allocator would
    need, and ``process_bytes`` that and the context; ``headroom_bytes`` is then negative.
    """

    case: Case
    exact: bool  # gradients equal those of the same network at the same precision
    fits: bool
    peak_reserved_bytes: int
    process_bytes: int
    needs_bytes: int
    headroom_bytes: int  # of the caching allocator's capacity, above its peak
    slowdown: float | None  # over the same network at the same precision with everything kept
    slowdown_evidence: Literal["measured", "predicted"]

    def to_dict(self) -> dict[str, Any]:
        """Return the proposal as JSON-ready data."""
        return {
            "network": self.case.network,
            "network_options": self.case.network_options,
            "variant": self.case.variant,
            "techniques": [use.name for use in self.case.techniques],
            "technique_options": {u.name: u.options for u in self.case.techniques if u.options},
            "precision": self.case.precision,
            "exact": self.exact,
            "fits": self.fits,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "process_bytes": self.process_bytes,
            "slowdown": self.slowdown,
            "slowdown_evidence": self.slowdown_evidence,
            "needs_bytes": self.needs_bytes,
            "headroom_bytes": self.headroom_bytes,
            "shape": list(self.case.shape),
            "requested_shape": list(self.case.requested_shape),
            "mode": self.case.mode,
            "batch_size": self.case.batch_size,
            "evidence": "predicted",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Proposals in order: those that fit first; exact ones before others; then by slowdown."""

    card: Card
    proposals: tuple[Proposal, ...]
    left_out: Mapping[str, str]  # what could not be simulated -> why

    @property
    def fitting(self) -> tuple[Proposal, ...]:
        """Those that fit, the best first."""
        return tuple(p for p in self.proposals if p.fits)

    @property
    def nearest(self) -> Proposal:
        """The proposal that needs the least."""
        return min(self.proposals, key=lambda p: p.needs_bytes)


def make_plan(
    case: Case,
    simulator: Simulator,
    *,
    precisions: Sequence[Precision] = ("fp32", "fp16"),
    allow_architecture: bool = False,
    times: Mapping[str, float] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> Plan:
    """Simulate the combinations for the simulator's card, and put them in order.

    Checkpoints are placed twice: for the least peak, and, where the card does not ask for that
    much, for the least recomputation that fits it.

    ``case``: the network as it is, with no technique. ``times``: measured step times on the card,
    by a case's digest, see ``measured_times``.
    Errors: MembenchError where the network cannot be simulated as it is.
    """
    alone = single(replace(case, precision=precisions[0]))
    done = _simulated(alone, simulator, on_record)
    plain = done[alone[0].digest()]
    if plain.status not in ("ok", "oom"):
        raise MembenchError(f"{case.network} cannot be planned for: {plain.reason}")
    worked = [one for one in alone if done[one.digest()].status in ("ok", "oom")]
    working = [use for one in worked for use in one.techniques]
    cases = combined(case, working, precisions, allow_architecture)
    cases += [one for one in alone if one.digest() not in {c.digest() for c in cases}]
    missing = [one for one in cases if one.digest() not in done]
    done |= _simulated(missing, simulator, on_record)
    placed = place_for_card(cases, done, simulator, on_record)
    cases += [one for one, _ in placed]
    done |= {one.digest(): record for one, record in placed}
    return _ordered(cases, done, simulator.card, times or {})


def _simulated(
    cases: Sequence[Case], simulator: Simulator, on_record: Callable[[Record], None] | None
) -> dict[str, Record]:
    """Return the records by digest. The slowest go first, so that no child waits for a last one."""
    slow = sorted(cases, key=lambda c: not any(use.name in _SLOW for use in c.techniques))
    records = simulator.records(slow, on_record=on_record)
    return {one.digest(): record for one, record in zip(slow, records, strict=True)}


def _ordered(
    cases: Sequence[Case], done: Mapping[str, Record], card: Card, times: Mapping[str, float]
) -> Plan:
    proposals: list[Proposal] = []
    left_out: dict[str, str] = {}
    for case in cases:
        record = done[case.digest()]
        plain_case = dataclasses.replace(case, techniques=(), variant="")
        plain_digest = _plain_digest(plain_case, done)
        if record.status not in ("ok", "oom") or plain_digest is None:
            left_out[case.variant] = record.reason
            continue
        proposals.append(_proposal(case, record, card, times, done[plain_digest], plain_digest))
    proposals.sort(key=_order)
    return Plan(card=card, proposals=tuple(proposals), left_out=left_out)


def _plain_digest(plain: Case, done: Mapping[str, Record]) -> str | None:
    """Return the digest of the same network and precision without techniques, if it was traced."""
    from bench.plan.combinations import variant_name

    digest = dataclasses.replace(plain, variant=variant_name(plain, ())).digest()
    record = done.get(digest)
    return digest if record is not None and record.status in ("ok", "oom") else None


def _proposal(
    case: Case,
    record: Record,
    card: Card,
    times: Mapping[str, float],
    plain: Record,
    plain_digest: str,
) -> Proposal:
    fits = record.status == "ok"
    needs = record.needs_bytes or 0
    reserved = (record.peak_reserved_bytes or 0) if fits else needs
    context = record.parts.context_bytes or card.context_bytes
    digest = case.digest()
    measured = digest in times and plain_digest in times
    slowdown = predicted_slowdown(record, plain)
    if measured:
        slowdown = times[digest] / times[plain_digest]
    return Proposal(
        case=case,
        exact=record.exact,
        fits=fits,
        peak_reserved_bytes=reserved,
        process_bytes=reserved + context,
        needs_bytes=needs,
        headroom_bytes=card.memory_bytes - context - reserved,
        slowdown=slowdown,
        slowdown_evidence="measured" if measured else "predicted",
    )


def _order(proposal: Proposal) -> tuple[Any, ...]:
    slowdown = float("inf") if proposal.slowdown is None else proposal.slowdown
    rank = ("fp32", "bf16", "fp16").index(proposal.case.precision)
    size = len(proposal.case.network_options), len(proposal.case.techniques)
    if not proposal.fits:
        return (1, proposal.needs_bytes)
    return (0, not proposal.exact, slowdown, rank, *size, proposal.peak_reserved_bytes)
