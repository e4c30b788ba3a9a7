"""The words and figures that a reader sees, the same on the terminal and in markdown.

A dash stands for what is not known or does not apply. A star marks a ratio taken from what cases
need instead of what they used, because one of the two does not fit the card.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from bench.record import Record
from bench.report.rows import Ratio, Row, Section, Table, evidence_text
from bench.report.times import NOISY_SHARE, step_time_cell, timing, voxel_rate_cell
from bench.units import format_bytes

__all__ = [
    "NONE",
    "STAR",
    "cells",
    "figure_text",
    "flops_text",
    "made_with",
    "notes",
    "per_cent_text",
    "ratio_text",
    "recomputation_text",
    "section_title",
    "shape_text",
    "short_title",
    "size_text",
    "step_time_text",
    "table_title",
    "uncalibrated_parts",
]

NONE = "-"
STAR = "*"
_MEMORY_NOTE = (
    "GPU memory: what the whole process holds, as nvidia-smi shows it. needs: the smallest card "
    "memory on which the case completes. Both with the CUDA context."
)
_STATUS = {"oom": "does not fit"}


def size_text(size_bytes: int | None) -> str:
    """Return bytes as GiB or MiB, a dash for None."""
    return NONE if size_bytes is None else format_bytes(size_bytes)


def ratio_text(ratio: Ratio | None) -> str:
    """Return ``0.62``, with a star when it is of needs."""
    return NONE if ratio is None else f"{ratio.value:.2f}{STAR if ratio.by_needs else ''}"


def flops_text(flops: int | None) -> str:
    """Return all digits, as papers print them: ``47,952,691,200``; a dash for None."""
    return NONE if flops is None else f"{flops:,}"


def recomputation_text(record: Record) -> str:
    """Return ``1.33``, the step's FLOPs over those of computing everything once."""
    factor = record.recomputation_factor
    return NONE if factor is None or record.mode != "train" else f"{factor:.2f}"


def step_time_text(times_s: Sequence[float]) -> str:
    """Return the median of the measured steps; a dash where none was measured."""
    return f"{statistics.median(times_s):.3g} s" if times_s else NONE


def per_cent_text(row: Row) -> str:
    """Return ours in per cent of the paper's, or whether we agree with its "more than"."""
    if row.of_paper is not None:
        return f"{row.of_paper.value:.0%}".replace("%", " %") + STAR * row.of_paper.by_needs
    return row.agreement or NONE


def figure_text(row: Row) -> str:
    """Return our figure in full: ``26.4 GiB``, ``does not fit 31.7 GiB: needs 41.6 GiB``.

    Where a run ended and its needs are not known, as of a measured one: ``> 31.7 GiB, does not
    fit``, of the card's size.
    """
    record = row.record
    if record.status == "ok":
        return size_text(row.used_bytes)
    if record.status != "oom":
        return record.status
    if row.card_bytes is not None:
        if row.needs_bytes is None:
            return f"{_unfit_text(row)}, does not fit"
        return f"does not fit {size_text(row.card_bytes)}: needs {size_text(row.needs_bytes)}"
    # Without the context's size only the allocator's share can be said.
    text = "does not fit"
    if record.capacity_bytes is not None:
        text += f" {size_text(record.capacity_bytes)} of allocator"
    if record.needs_bytes is not None:
        text += f": needs {size_text(record.needs_bytes)} of allocator"
    return text


def cells(row: Row) -> dict[str, str]:
    """Return every cell that a row may show, by its column."""
    record = row.record
    fits = record.status == "ok"
    return {
        "variant": record.variant,
        "precision": record.precision,
        "parameters": NONE if record.parameters is None else f"{record.parameters:,}",
        "status": record.status,
        "GPU memory": size_text(row.used_bytes) if fits else _unfit_text(row),
        "needs": size_text(row.needs_bytes),
        "ratio": ratio_text(row.ratio),
        "paper": row.paper.text if row.paper else NONE,
        "of paper": per_cent_text(row),
        "requested": _peak_text(record, record.peak_requested_bytes),
        "allocated": _peak_text(record, record.peak_allocated_bytes),
        "reserved": _peak_text(record, record.peak_reserved_bytes),
        "host": size_text(record.peak_host_bytes),
        "recomputation": recomputation_text(record),
        "step time": step_time_cell(record),
        "voxels/s": voxel_rate_cell(record),
        "evidence": evidence_text(record),
    }


def _unfit_text(row: Row) -> str:
    """Return ``> 31.7 GiB``, the card's size, where that is all that is known, as papers do."""
    record = row.record
    if record.status == "oom" and row.needs_bytes is None and row.card_bytes is not None:
        return f"> {size_text(row.card_bytes)}"
    return _STATUS.get(record.status, record.status)


def _peak_text(record: Record, peak_bytes: int | None) -> str:
    """Return a peak; "> " where the run ended before its peak, for want of memory."""
    if record.status not in ("ok", "oom"):
        return NONE
    text = size_text(peak_bytes)
    return f"> {text}" if record.status == "oom" and peak_bytes is not None else text


def shape_text(shape: Iterable[int]) -> str:
    """Return ``256x256x152``."""
    return "x".join(map(str, shape))


def section_title(section: Section, table: Table) -> str:
    """Return the shape, what it is run as, and what else tells this section from the others."""
    record = section.first
    title = short_title(section, table)
    if record.shape != record.requested_shape:
        title += f", run as {shape_text(record.shape)}"
    if record.volumes:
        shown = ", ".join(record.volumes[:2])
        more = len(record.volumes) - 2
        title += f" ({shown}{f' and {more} more' if more > 0 else ''})"
    return title


def short_title(section: Section, table: Table) -> str:
    """Return the shape that was asked for, and the network, mode and batch where they differ."""
    record, others = section.first, [s.first for s in table.sections]
    title = shape_text(record.requested_shape)
    if len({r.network for r in others}) > 1:
        title = f"{record.network} {title}"
    if len({r.mode for r in others}) > 1 or record.mode != "train":
        title += f", {record.mode}"
    if len({r.batch_size for r in others}) > 1 or record.batch_size != 1:
        title += f", batch {record.batch_size}"
    return title


def table_title(table: Table) -> str:
    """Return suite, card, its memory and the evidence: what every figure below it stands for."""
    record = table.first
    networks = ", ".join(dict.fromkeys(s.first.network for s in table.sections))
    card = record.card or "unknown card"
    memory = next((row.card_bytes for row in table.rows if row.card_bytes is not None), None)
    if memory is not None:
        card += f" ({size_text(memory)})"
    if record.capped_to:
        card += f" capped to {record.capped_to}"
    return f"{table.suite or 'records'}: {networks} on {card}, {table.evidence}"


def made_with(table: Table) -> str:
    """Return torch, settings, commit and date of a table's records, as one line."""
    made = [row.record.environment for row in table.rows]
    words = [f"torch {_listed(e.torch for e in made) or 'not recorded'}"]
    words += [f"CUDA {text}" for text in [_listed(e.cuda for e in made)] if text]
    capacity = next((r.record.capacity_bytes for r in table.rows if r.record.capacity_bytes), None)
    if capacity is not None:
        words.append(f"{size_text(capacity)} for the allocator")
    if table.first.environment.allocator_settings:
        words.append(f"allocator settings {table.first.environment.allocator_settings}")
    if any(e.cudnn_benchmark for e in made):
        words.append("cudnn.benchmark on")
    commits = _listed(e.commit and e.commit[:10] + ("+changes" if e.dirty else "") for e in made)
    words += [f"commit {text}" for text in [commits] if text]
    words += [text for text in [_listed(sorted({(e.started_at or "")[:10] for e in made}))] if text]
    return ", ".join(words)


def notes(table: Table) -> list[str]:
    """Return what a reader must know to read the figures; only what this table shows."""
    rows = table.rows
    lines = [_MEMORY_NOTE]
    if table.baselines:
        names = " or ".join(repr(name) for name in table.baselines)
        lines.append(f"ratio: GPU memory to that of {names} at the same shape.")
    if any(r and r.by_needs for row in rows for r in (row.ratio, row.of_paper)):
        lines.append(f"{STAR} taken from needs, because a case does not fit the card.")
    if any(row.paper for row in rows):
        lines.append(
            "paper: as printed there; of paper: our bytes over its bytes. GB = 10^9 bytes and "
            "GiB = 2^30 bytes, so 1 GB = 0.93 GiB."
        )
    parts = uncalibrated_parts(table)
    if parts:
        card = table.first.card
        lines.append(f"Not calibrated on {card}, so estimated: {', '.join(parts)}.")
    if any(row.record.peak_host_bytes is not None for row in rows):
        lines.append("host: pinned memory of the machine, beside the GPU's, that offloading took.")
    lines += _time_notes([row.record for row in rows])
    if table.first.evidence == "predicted":
        lines.append("Predicted figures come from a simulated run: no GPU was used.")
    return lines


def _time_notes(records: Sequence[Record]) -> list[str]:
    timed = [record.step_times_s for record in records if record.step_times_s]
    if not timed:
        return []
    counts = sorted({len(times) for times in timed})
    meaning = (
        f"step time: median of {' or '.join(map(str, counts))} measured steps after a warm-up; "
        "IQR: within it lies the middle half of them. voxels/s: of the whole batch, as run."
    )
    lines = [meaning]
    if any(found is not None and found.noisy for found in map(timing, timed)):
        lines.append(f"noisy: an IQR above {NOISY_SHARE:.0%} of the median; measure again.")
    return lines


def uncalibrated_parts(table: Table) -> list[str]:
    """Return the parts that some record of the table only estimates."""
    return list(dict.fromkeys(part for row in table.rows for part in row.record.uncalibrated))


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))
