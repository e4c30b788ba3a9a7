"""A folder of volumes on a card, as lines and as a cell of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.plan.folder import FolderShape
    from bench.plan.largest import Largest
    from bench.plan.volumes import FolderFit
    from bench.record import Record

__all__ = ["folder_cell", "folder_lines", "volume_name"]

_NAMED = 5  # of the volumes that do not fit; --json names all


def folder_cell(one: FolderFit) -> str:
    """Return ``37 of 48, 160x160x96``: how many fit whole, and the patch for the others."""
    from bench.shapes import format_shape

    count = f"{one.share.fitting} of {one.share.folder.total}"
    if one.share.fitting == one.share.folder.total:
        return count
    patch = one.patch.shape if one.patch is not None else None
    return f"{count}, {format_shape(patch) if patch else 'no patch'}"


def folder_lines(one: FolderFit) -> list[str]:
    """Return how many volumes fit, the worst, the largest that fits, and what does for the rest."""
    from bench.units import format_bytes

    share, folder = one.share, one.share.folder
    techniques = "+".join(use.name for use in one.case.techniques) or "no techniques"
    what = f"{one.case.network}, {techniques}, {one.case.precision}, {one.case.mode}"
    simulated, distinct = len(share.records), len(folder.shapes)
    lines = [
        (
            f"{what}: {share.fitting} of {folder.total} volumes fit {one.card.name} "
            f"({100 * share.fitting / folder.total:.0f} %, predicted)"
        ),
        (
            f"  worst: {volume_name(one.worst)}, needs {format_bytes(one.worst_needs_bytes)} "
            f"of the caching allocator, there are {format_bytes(one.card.capacity_bytes)}"
        ),
    ]
    if share.fitting:
        (largest,) = (s for s in folder.shapes if s.shape == one.shape)
        lines.append(f"  largest that fits: {volume_name(largest)}, {_bytes(one.largest.record)}")
    if share.rest:
        lines += _rest_lines(one)
    follow = "" if simulated == distinct else ", the others follow from larger or smaller ones"
    lines.append(f"  {simulated} of {distinct} distinct shapes were simulated{follow}")
    if not share.monotonic:
        lines.append("  a volume fits that is larger than one that does not: each was simulated")
    return lines


def _rest_lines(one: FolderFit) -> list[str]:
    from bench.plan.shares import within
    from bench.plan.volumes import rest_sides

    share = one.share
    names = [name for shape in share.rest for name in shape.volumes]
    who = "the one that does not fit" if len(names) == 1 else f"the {len(names)} that do not fit"
    more = f" and {len(names) - _NAMED} more (--json names all)" if len(names) > _NAMED else ""
    patch = one.patch.shape if one.patch is not None else None
    lines = [f"  no patch fits for {who}"]
    if one.patch is not None and patch is not None:
        shorter = sum(not within(patch, sides) for sides in rest_sides(share))
        padded = f"; {shorter} of them padded" if shorter else ""
        lines = [f"  for {who}: {_patch_text(one.patch)}{padded}"]
        if shorter and one.patch_within is not None:
            lines.append(f"    within every one of them: {_patch_text(one.patch_within)}")
    return [*lines, f"  too large: {', '.join(names[:_NAMED])}{more}"]


def _patch_text(patch: Largest) -> str:
    from bench.shapes import format_shape

    return f"patches of {format_shape(patch.case.shape)}, {_bytes(patch.record)}"


def volume_name(one: FolderShape) -> str:
    """Return a file, how many others are padded to the same shape, and what that is."""
    from bench.shapes import format_shape

    padded = f", run as {format_shape(one.shape)}" if one.shape != one.requested else ""
    others = f" and {len(one.volumes) - 1} alike" if len(one.volumes) > 1 else ""
    return f"{one.volumes[0]}{others} ({format_shape(one.requested)}{padded})"


def _bytes(record: Record) -> str:
    from bench.units import format_bytes

    reserved, process = record.peak_reserved_bytes or 0, record.process_bytes or 0
    return f"peak reserved {format_bytes(reserved)}, of the process {format_bytes(process)}"
