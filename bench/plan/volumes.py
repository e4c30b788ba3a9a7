"""What of a folder of volumes fits a card, which is the worst, and what patch does for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bench.case import Case
from bench.plan.folder import Folder, FolderShape
from bench.plan.largest import Largest, LargestSearch
from bench.plan.patches import patches
from bench.plan.readings import Readings, at_shape
from bench.plan.shares import Share, find_share, maxima, within
from bench.plan.simulator import Simulator
from bench.predict.cards import Card
from bench.record import Record
from bench.shapes import Shape, pad_to

__all__ = ["FolderFit", "FolderSearch", "find_patch", "rest_sides", "worst_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFit:
    """How a folder fits a card with one choice of techniques. Predicted, not measured.

    ``largest`` is the largest volume that fits, or the smallest of the folder where none does.
    """

    share: Share
    largest: Largest
    worst: FolderShape
    worst_needs_bytes: int
    patch: Largest | None  # nnU-Net's, for the volumes that do not fit; None if all fit, or none
    patch_within: Largest | None  # one that no such volume is shorter than on any axis

    @property
    def card(self) -> Card:
        """The card that it is about."""
        return self.share.card

    @property
    def case(self) -> Case:
        """The case at the largest volume that fits, or at the smallest of the folder."""
        return self.largest.case

    @property
    def shape(self) -> Shape | None:
        """The largest volume's padded shape; None where no volume fits."""
        return self.largest.shape

    def to_dict(self) -> dict[str, Any]:
        """Return the largest volume as JSON-ready data, and with it ``volumes``, the folder."""
        share, folder = self.share, self.share.folder
        fitting = [one for one in folder.shapes if share.fits[one.shape]]
        volumes = {
            "folder": str(folder.path),
            "spacing": list(folder.spacing) if folder.spacing else None,
            "total": folder.total,
            "fitting": share.fitting,
            "share": share.fitting / folder.total,
            "shapes": len(folder.shapes),
            "simulated_shapes": len(share.records),
            "median_shape": list(folder.median),
            "worst": {
                **_named(self.worst),
                "needs_bytes": self.worst_needs_bytes,
                "fits": share.fits[self.worst.shape],
            },
            "largest_fitting": _named(fitting[0]) if fitting else None,
            "not_fitting": [name for one in share.rest for name in one.volumes],
            "patch": _patch(self.patch, share),
            "patch_within_all": _patch(self.patch_within, share),
            "cases": [_case(one, share) for one in folder.shapes],
            "evidence": "predicted",
        }
        return {**self.largest.to_dict(), "volumes": volumes}


class FolderSearch:
    """Answers for one case, at any shape, and one folder; a card after another."""

    def __init__(self, case: Case, folder: Folder, simulator: Simulator) -> None:
        self._folder, self._simulator = folder, simulator
        self._readings = Readings(case, simulator)

    def find(self, card: Card) -> FolderFit:
        """Return how the folder fits ``card``.

        Errors: MembenchError where a shape cannot be simulated; the volume is named.
        """
        shapes = [one.shape for one in self._folder.shapes]
        # The worst is among the maxima; the smallest shows whether the network takes it at all.
        first = list(dict.fromkeys([*maxima(shapes), shapes[-1]]))
        share = find_share(self._readings, self._folder, card, first=first)
        worst, needs = worst_of(share)
        return FolderFit(
            share=share,
            largest=self._largest(share),
            worst=worst,
            worst_needs_bytes=needs,
            patch=find_patch(self._readings, share, self._simulator),
            patch_within=find_patch(self._readings, share, self._simulator, within_all=True),
        )

    def _largest(self, share: Share) -> Largest:
        shapes = [one.shape for one in self._folder.shapes]  # the largest first
        fitting = [shape for shape in shapes if share.fits[shape]]
        larger = [one.shape for one in share.rest]
        shown = fitting[0] if fitting else shapes[-1]
        return Largest(
            card=share.card,
            case=at_shape(self._readings.case, shown),
            shape=shown if fitting else None,
            record=self._record(shown, share),
            next_shape=larger[-1] if fitting and larger else None,
            monotonic=share.monotonic,
        )

    def _record(self, shape: Shape, share: Share) -> Record:
        return share.records.get(shape) or self._readings.at(shape, share.card)


def worst_of(share: Share) -> tuple[FolderShape, int]:
    """Return the shape that needs the most memory of those simulated, and how many bytes."""
    needs = {shape: record.needs_bytes or 0 for shape, record in share.records.items()}
    simulated = [one for one in share.folder.shapes if one.shape in needs]
    worst = max(simulated, key=lambda one: needs[one.shape])
    return worst, needs[worst.shape]


def find_patch(
    readings: Readings, share: Share, simulator: Simulator, *, within_all: bool = False
) -> Largest | None:
    """Return the largest patch that fits, for the volumes that do not; None if there is none.

    It is no larger than the folder's median shape, as nnU-Net has it, which pads the volumes that
    are shorter; ``within_all``: nor than any of the volumes that do not fit.
    Errors: MembenchError where no patch can be simulated.
    """
    folder = share.folder
    sides = rest_sides(share)
    if not sides:
        return None
    limits = [folder.median, *(sides if within_all else ())]
    start = tuple(
        max(min(axis) // by, 1) * by
        for axis, by in zip(zip(*limits, strict=True), folder.divisor, strict=True)
    )
    path = patches(start, folder.median, folder.divisor)
    search = LargestSearch(
        readings.case,
        lambda steps: path[steps - 1],
        simulator,
        limit=len(path),
        readings=readings,
    )
    found = search.find(share.card)
    return found if found.shape is not None else None


def rest_sides(share: Share) -> list[Shape]:
    """Return the sides, before padding, of every volume that does not fit."""
    rest = {one.shape for one in share.rest}
    return [s for s in share.folder.sides if pad_to(s, share.folder.divisor) in rest]


def _named(one: FolderShape) -> dict[str, Any]:
    return {
        "volume": one.volumes[0],
        "requested_shape": list(one.requested),
        "shape": list(one.shape),
    }


def _case(one: FolderShape, share: Share) -> dict[str, Any]:
    record = share.records.get(one.shape)
    return {
        "shape": list(one.shape),
        "volumes": list(one.volumes),
        "fits": share.fits[one.shape],
        "simulated": record is not None,
        "needs_bytes": record.needs_bytes if record is not None else None,
    }


def _patch(patch: Largest | None, share: Share) -> dict[str, Any] | None:
    if patch is None or patch.shape is None:
        return None
    shorter = [s for s in rest_sides(share) if not within(patch.shape, s)]
    return {
        "shape": list(patch.shape),
        "voxels": math.prod(patch.shape),
        "needs_bytes": patch.record.needs_bytes,
        "peak_reserved_bytes": patch.record.peak_reserved_bytes,
        "process_bytes": patch.record.process_bytes,
        "next_shape": list(patch.next_shape) if patch.next_shape else None,
        "volumes_padded": len(shorter),
    }
