"""A prediction in words: its figures, and who holds the bytes at its peak."""

from __future__ import annotations

from bench.explain import AXES, AXIS_TITLES, held_by
from bench.record import Record
from bench.units import format_bytes

__all__ = ["explanation", "figures_text"]


def figures_text(record: Record) -> str:
    """Return the figures of a predicted record, a line each; all are predicted."""
    rows = [
        ("peak allocated", record.peak_allocated_bytes),
        ("peak reserved", record.peak_reserved_bytes),
        ("of the process", record.process_bytes),
        ("needs at least", record.needs_bytes),
    ]
    lines = [f"{record.case} on {record.card}, {record.precision}, predicted ({record.tracer})"]
    lines += [f"  {name:16}{format_bytes(size)}" for name, size in rows if size is not None]
    lines.append("  fits" if record.status == "ok" else f"  does not fit: {record.reason}")
    lines += [f"  estimated: {part}" for part in record.uncalibrated]
    lines += [f"  note: {note}" for note in record.environment.notes]
    return "\n".join(lines)


def explanation(record: Record, top: int = 10) -> str:
    """Return who holds the requested bytes at the peak: along each axis the ``top`` largest."""
    total = sum(holder.bytes for holder in record.peak_holders)
    cut = ", which ended before its peak for want of memory" if record.status == "oom" else ""
    peak = format_bytes(record.peak_allocated_bytes or 0)
    lines = [
        f"{record.case} on {record.card} (predicted): peak allocated {peak}{cut}",
        f"tensors and workspaces asked for {format_bytes(total)}",
    ]
    for axis in AXES:
        shares = held_by(record.peak_holders, axis)
        lines += ["", AXIS_TITLES[axis]]
        lines += [
            f"  {format_bytes(share.bytes):>10} {share.bytes / total:6.1%}  {share.name}"
            for share in shares[:top]
        ]
        if len(shares) > top:
            rest = sum(share.bytes for share in shares[top:])
            lines.append(
                f"  {format_bytes(rest):>10} {rest / total:6.1%}  in {len(shares) - top} more"
            )
    return "\n".join(lines)
