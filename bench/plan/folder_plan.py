"""A plan for a folder of volumes: made for the worst of them, with the share that fits of each.

The worst is the volume that needs most with no technique. What a proposal takes there says little
of the others where it does not fit, so they are simulated, for the best proposals only: as many as
``MOST_SIMULATIONS`` allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.case import Case, Precision
from bench.errors import MembenchError
from bench.plan.folder import Folder, FolderShape
from bench.plan.largest import Largest
from bench.plan.readings import Readings, at_shape
from bench.plan.search import Plan, Proposal, make_plan
from bench.plan.shares import Share, find_share, maxima, within
from bench.plan.simulator import Simulator
from bench.plan.volumes import find_patch, worst_of
from bench.shapes import Shape

__all__ = ["MOST_SIMULATIONS", "FolderPlan", "FolderProposal", "make_folder_plan"]

MOST_SIMULATIONS = 60
"""Once so many shapes were simulated beside the plan itself, no further proposal is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderProposal:
    """One combination, simulated at the worst volume, and what it does for the folder."""

    proposal: Proposal
    folder: Folder
    worst: FolderShape
    share: Share | None  # None: not looked at
    patch: Largest | None  # for the volumes that do not fit

    @property
    def total(self) -> int:
        """How many volumes the folder has."""
        return self.folder.total

    @property
    def fits_all(self) -> bool:
        """Whether every volume is known to fit."""
        return self.share is not None and self.share.fitting == self.total

    @property
    def least_fitting(self) -> int:
        """How many volumes fit at the least, by what was simulated of the worst alone."""
        if not self.proposal.fits:
            return 0
        shapes = self.folder.shapes
        return sum(len(s.volumes) for s in shapes if within(s.shape, self.worst.shape))

    def to_dict(self) -> dict[str, Any]:
        """Return the proposal's JSON-ready data and the folder's: ``fits`` is of the worst."""
        patch = self.patch
        return {
            **self.proposal.to_dict(),
            "volumes_fitting": self.share.fitting if self.share is not None else None,
            "volumes_total": self.total,
            "worst_volume": self.worst.volumes[0],
            "patch_shape": list(patch.shape) if patch is not None and patch.shape else None,
            "patch_peak_reserved_bytes": patch.record.peak_reserved_bytes if patch else None,
        }

    def at_patch(self) -> Proposal:
        """Return the proposal at its patch, where it fits.

        Errors: ValueError where it has none.
        """
        if self.patch is None:
            raise ValueError("this proposal has no patch")
        record, card = self.patch.record, self.patch.card
        reserved = record.peak_reserved_bytes or 0
        process = record.process_bytes or 0
        return replace(
            self.proposal,
            case=at_shape(self.proposal.case, self.patch.case.shape),
            fits=True,
            peak_reserved_bytes=reserved,
            process_bytes=process,
            needs_bytes=record.needs_bytes or 0,
            headroom_bytes=card.memory_bytes - process,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderPlan:
    """Proposals in order: those that fit all volumes, by ``Plan``'s order; then by their share."""

    plan: Plan
    folder: Folder
    worst: FolderShape
    proposals: tuple[FolderProposal, ...]

    @property
    def fitting(self) -> tuple[FolderProposal, ...]:
        """Those with which every volume fits."""
        return tuple(one for one in self.proposals if one.fits_all)

    @property
    def usable(self) -> tuple[FolderProposal, ...]:
        """Those that fit all volumes; where there is none, those with a patch for the rest."""
        return self.fitting or tuple(one for one in self.proposals if one.patch is not None)


def make_folder_plan(
    case: Case,
    folder: Folder,
    simulator: Simulator,
    *,
    precisions: Sequence[Precision] = ("fp32", "fp16"),
    allow_architecture: bool = False,
    times: Mapping[str, float] | None = None,
) -> FolderPlan:
    """Plan for the volume of ``folder`` that needs most, and look at the others.

    ``case``: the network with no technique, at any shape. The rest is ``make_plan``'s.
    Errors: MembenchError where the network cannot be simulated.
    """
    plain = replace(case, precision=precisions[0])
    shapes = [one.shape for one in folder.shapes]
    first = list(dict.fromkeys([*maxima(shapes), shapes[-1]]))
    worst, _ = worst_of(find_share(Readings(plain, simulator), folder, simulator.card, first=first))
    # A suite does not pad for a user's network, whose divisor is not in it.
    requested = worst.shape if case.imported is not None else worst.requested
    plan = make_plan(
        at_shape(case, worst.shape, requested),
        simulator,
        precisions=precisions,
        allow_architecture=allow_architecture,
        times=times,
    )
    used = simulator.traced
    around = _fits_around(plan, folder, worst, simulator)
    looked: list[FolderProposal] = []
    for proposal in _most_wanted(plan):
        share, patch = None, None
        if simulator.traced - used < MOST_SIMULATIONS:
            known = {worst.shape: proposal.fits, **around.get(proposal.case.digest(), {})}
            share, patch = _look(proposal, folder, known, simulator)
        looked.append(
            FolderProposal(proposal=proposal, folder=folder, worst=worst, share=share, patch=patch)
        )
    looked.sort(key=_order)
    return FolderPlan(plan=plan, folder=folder, worst=worst, proposals=tuple(looked))


def _fits_around(
    plan: Plan, folder: Folder, worst: FolderShape, simulator: Simulator
) -> dict[str, dict[Shape, bool]]:
    """Return the proposals, by digest, with which a shape fits that no volume is larger than.

    It is as long on each axis as the longest volume. One simulation says of a proposal with room
    to spare that all volumes fit; it is left out where the voxels say that it would not.
    """
    shape = tuple(max(axis) for axis in zip(*(one.shape for one in folder.shapes), strict=True))
    if shape == worst.shape:
        return {}
    voxels, of_worst = math.prod(shape), math.prod(worst.shape)
    room = plan.card.capacity_bytes * of_worst
    hopeful = [p for p in plan.fitting if p.needs_bytes * voxels <= room][: MOST_SIMULATIONS // 2]
    records = simulator.records([at_shape(p.case, shape) for p in hopeful])
    return {
        proposal.case.digest(): {shape: True}
        for proposal, record in zip(hopeful, records, strict=True)
        if record.status == "ok"
    }


def _most_wanted(plan: Plan) -> list[Proposal]:
    """Return the proposals in the order in which they are looked at.

    Those that fit the worst volume; the network as it is, to know what it does alone; then those
    that need least, of which most volumes fit.
    """
    others = [p for p in plan.proposals if not p.fits]
    others.sort(key=lambda p: (bool(p.case.techniques), p.needs_bytes))
    return [*plan.fitting, *others]


def _look(
    proposal: Proposal, folder: Folder, known: Mapping[Shape, bool], simulator: Simulator
) -> tuple[Share | None, Largest | None]:
    """Return the proposal's share and patch; None for what its techniques refuse to run at."""
    readings = Readings(proposal.case, simulator)
    readings.learn(proposal.case.shape, simulator.card, proposal.needs_bytes)
    try:
        share = find_share(readings, folder, simulator.card, known=known)
    except MembenchError:
        return None, None
    try:
        return share, find_patch(readings, share, simulator)
    except MembenchError:
        return share, None


def _order(one: FolderProposal) -> tuple[Any, ...]:
    """Put what fits all volumes first, in the plan's order, then by how many fit."""
    slowdown = float("inf") if one.proposal.slowdown is None else one.proposal.slowdown
    if one.fits_all:
        return (0,)  # sorting is stable: the plan's own order
    if one.share is None:
        return (2, not one.proposal.fits)
    return (1, -one.share.fitting, not one.proposal.exact, slowdown)
