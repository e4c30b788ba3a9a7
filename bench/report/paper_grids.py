"""The papers' report's tables: a paper's figures beside ours, and full against pocket widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from bench.case import PaperTime, known_fields
from bench.record import Record
from bench.report.cells import (
    NONE,
    STAR,
    cells,
    figure_text,
    flops_text,
    recomputation_text,
    short_title,
    size_text,
    step_time_text,
)
from bench.report.grids import escaped, telling
from bench.report.rows import Row, Section, Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["cases_grid", "paper_time", "pocket_grid", "pocket_pairs"]

_POCKET = "+pocket"


def paper_time(record: Record) -> PaperTime | None:
    """Return the time that the paper prints for a record's case."""
    time = record.definition.get("paper_time")
    return PaperTime(**known_fields(PaperTime, time)) if time else None


def cases_grid(table: Table) -> pd.DataFrame:
    """Return a row for each case: its memory, FLOPs and time, the paper's figure after each."""
    import pandas as pd

    several = len({row.record.network for row in table.rows}) > 1
    lines = []
    for section in table.sections:
        for row in section.rows:
            line = _case_line(row, _shape_title(section, table))
            if several:
                line = {"network": row.record.network} | line
            lines.append({name: escaped(text) for name, text in line.items()})
    frame = telling(pd.DataFrame(lines))
    idle = [c for c in ("ratio", "recomputation") if c in frame and set(frame[c]) <= {"1.00", NONE}]
    return frame.drop(columns=idle)


def _shape_title(section: Section, table: Table) -> str:
    """Return the section's title with its mode said in full; the rows name their network."""
    record = section.first
    title = short_title(section, table).removeprefix(f"{record.network} ")
    return title.replace(", infer", ", prediction").replace(", train", ", training step")


def _case_line(row: Row, title: str) -> dict[str, str]:
    record, printed = row.record, row.record.definition.get("paper_flops")
    texts = cells(row)
    time = paper_time(record)
    return {
        "variant": record.variant,
        "case": title,
        "parameters": texts["parameters"],
        "GPU memory": figure_text(row),
        "paper": texts["paper"],
        "of paper": texts["of paper"],
        "ratio": texts["ratio"],
        "recomputation": recomputation_text(record),
        "forward FLOPs": flops_text(record.forward_flops),
        "paper's FLOPs": flops_text(printed),
        "step FLOPs": flops_text(record.step_flops) if record.mode == "train" else NONE,
        "time": texts["step time"],
        "voxels/s": texts["voxels/s"],
        "paper's time": time.text if time else NONE,
    }


def pocket_pairs(table: Table) -> Iterator[tuple[Section, Row, Row]]:
    """Yield (section, full, pocket) for each variant that a row of pocket widths belongs to.

    A pocket row is called as the full one with ``+pocket`` behind it, or ``pocket`` where it
    belongs to the baseline.
    """
    for section in table.sections:
        by_variant = {row.record.variant: row for row in section.rows}
        for variant, row in by_variant.items():
            if variant == _POCKET[1:] and row.baseline is not None:
                full = by_variant.get(row.baseline.variant)
            elif variant.endswith(_POCKET):
                full = by_variant.get(variant.removesuffix(_POCKET))
            else:
                continue
            if full is not None and full is not row:
                yield section, full, row


def pocket_grid(pairs: Sequence[tuple[Section, Row, Row]], table: Table) -> pd.DataFrame:
    """Return a row for each pair: parameters, memory, FLOPs and time, full, pocket, and saved."""
    import pandas as pd

    lines = []
    for section, full, pocket in pairs:
        ours, theirs = pocket.record, full.record
        ratio = Row(ours, theirs).ratio
        star = STAR if ratio is not None and ratio.by_needs else ""
        line = {
            "variant": theirs.variant,
            "case": _shape_title(section, table),
            "parameters": f"{cells(full)['parameters']} to {cells(pocket)['parameters']}",
            "parameters saved": _saved(ours.parameters, theirs.parameters),
            "GPU memory": f"{_memory(full)} to {_memory(pocket)}",
            "GPU memory saved": _per_cent(ratio.value) + star if ratio is not None else NONE,
            "allocated saved": _allocated_saved(ours, theirs),
            "step FLOPs saved": _saved(ours.step_flops, theirs.step_flops),
            "time": _times(theirs, ours),
            "time saved": _saved(_seconds(ours), _seconds(theirs)),
        }
        lines.append({name: escaped(text) for name, text in line.items()})
    return telling(pd.DataFrame(lines))


def _memory(row: Row) -> str:
    if row.record.status == "oom":
        return f"needs {size_text(row.needs_bytes)}"
    return size_text(row.used_bytes) if row.record.status == "ok" else row.record.status


def _allocated_saved(ours: Record, theirs: Record) -> str:
    """Return what is saved of the allocator's peak, which no card's cache or context blurs."""
    if ours.status != "ok" or theirs.status != "ok":
        return NONE
    return _saved(ours.peak_allocated_bytes, theirs.peak_allocated_bytes)


def _saved(ours: float | None, theirs: float | None) -> str:
    return _per_cent(ours / theirs) if ours is not None and theirs else NONE


def _per_cent(ratio: float) -> str:
    return f"{1 - ratio:.1%}".replace("%", " %")


def _seconds(record: Record) -> float | None:
    return median(record.step_times_s) if record.step_times_s else None


def _times(full: Record, pocket: Record) -> str:
    if not full.step_times_s or not pocket.step_times_s:
        return NONE
    return f"{step_time_text(full.step_times_s)} to {step_time_text(pocket.step_times_s)}"
