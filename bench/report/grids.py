"""The tables of a report, as pandas frames of text, and how they become markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.record import Environment
from bench.report.cells import (
    NONE,
    cells,
    figure_text,
    flops_text,
    ratio_text,
    recomputation_text,
    section_title,
    short_title,
    size_text,
)
from bench.report.markup import MARKDOWN, Markup, escaped
from bench.report.rows import Row, Section, Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "environment_grid",
    "escaped",
    "figures_grid",
    "markdown_table",
    "paper_grid",
    "parts_grid",
    "telling",
]

_FIGURES = (
    *("variant", "precision", "status", "parameters", "GPU memory", "needs", "ratio"),
    *("paper", "of paper", "requested", "allocated", "reserved"),
)
_ENVIRONMENT = {
    "suite": "suite",
    "suite hash": "suite_hash",
    "commit": "commit",
    "uncommitted changes": "dirty",
    "membench": "membench",
    "torch": "torch",
    "CUDA of torch": "cuda",
    "cuDNN": "cudnn",
    "Triton": "triton",
    "driver": "driver",
    "GPU of the machine": "gpu",
    "allocator settings": "allocator_settings",
    "cudnn.benchmark": "cudnn_benchmark",
    "seed": "seed",
    "Python": "python",
    "platform": "platform",
    "notes": "notes",
}


def paper_grid(table: Table, markup: Markup = MARKDOWN) -> pd.DataFrame:
    """Return the table as a paper has it: a row for each variant, a column for each shape."""
    import pandas as pd

    several = len({row.record.network for row in table.rows}) > 1
    columns: dict[tuple[str, str], dict[str, str]] = {}
    for section in table.sections:
        for row in section.rows:
            record = row.record
            name = f"{record.network} {record.variant}" if several else record.variant
            line = columns.setdefault(
                (record.network, record.variant), {"variant": markup.text(name)}
            )
            line.setdefault("parameters", cells(row)["parameters"])
            line[markup.text(_column_title(section, table))] = _paper_cell(row, markup)
    return pd.DataFrame(list(columns.values())).fillna(NONE)


def _column_title(section: Section, table: Table) -> str:
    """Return a section's title without the network, which the rows of the table name."""
    title = short_title(section, table)
    record = section.first
    shared = [
        s.first
        for s in table.sections
        if s.first.network == record.network and short_title(s, table) == title
    ]
    if len(shared) > 1:  # one shape, padded in one section and not in the other
        title = section_title(section, table)
    return title.removeprefix(f"{record.network} ")


def _paper_cell(row: Row, markup: Markup) -> str:
    ours = markup.strong(figure_text(row))
    if row.ratio is not None:
        ours += f", {markup.text(ratio_text(row.ratio))}"
    if row.paper is None:
        return ours
    return markup.lines(ours, markup.text(f"paper {row.paper.text}"))


def figures_grid(table: Table, markup: Markup = MARKDOWN) -> pd.DataFrame:
    """Return every figure of every case."""
    import pandas as pd

    recomputes = any((row.record.recomputation_factor or 0) > 1 for row in table.rows)
    lines = []
    for section in table.sections:
        for row in section.rows:
            texts = cells(row)
            line = {"shape": section_title(section, table)}
            line |= {name: texts[name] for name in _FIGURES}
            line["forward FLOPs"] = flops_text(row.record.forward_flops)
            line["step FLOPs"] = flops_text(row.record.step_flops)
            line["recomputation"] = recomputation_text(row.record) if recomputes else NONE
            line |= {name: texts[name] for name in ("step time", "voxels/s")}
            lines.append({name: markup.text(text) for name, text in line.items()})
    return telling(pd.DataFrame(lines))


def telling(frame: pd.DataFrame) -> pd.DataFrame:
    """Leave out the columns that say nothing in any row."""
    return frame.loc[:, (frame != NONE).any()]


def parts_grid(table: Table, markup: Markup = MARKDOWN) -> pd.DataFrame:
    """Return what the GPU memory of each case is made of, and which part is an estimate."""
    import pandas as pd

    lines = []
    for section in table.sections:
        for row in section.rows:
            parts, fits = row.record.parts, row.record.status == "ok"
            line = {
                "shape": section_title(section, table),
                "variant": row.record.variant,
                # A run that ended early says nothing about the parts of a whole one.
                "tensors": size_text(parts.tensors_bytes if fits else None),
                "workspace": size_text(parts.workspace_bytes if fits else None),
                "allocator's cache": size_text(parts.allocator_bytes if fits else None),
                "context": size_text(parts.context_bytes),
                "GPU memory": figure_text(row),
                "not calibrated": ", ".join(row.record.uncalibrated) or NONE,
            }
            lines.append({name: markup.text(text) for name, text in line.items()})
    return telling(pd.DataFrame(lines))


def environment_grid(table: Table, markup: Markup = MARKDOWN) -> pd.DataFrame:
    """Return all that shaped the records; values that differ between them stand side by side."""
    import pandas as pd

    made_in = [row.record.environment for row in table.rows]
    lines = [
        {"what": name, "value": markup.text(_values_text(made_in, field))}
        for name, field in _ENVIRONMENT.items()
    ]
    days = sorted({(made.started_at or NONE)[:10] for made in made_in})
    lines.append({"what": "date", "value": markup.text(", ".join(days))})
    return pd.DataFrame(lines)


def _values_text(made_in: Sequence[Environment], field: str) -> str:
    values = dict.fromkeys(_value_text(getattr(made, field)) for made in made_in)
    known = [value for value in values if value != NONE]
    return ", ".join(known) or NONE


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "; ".join(map(str, value)) or NONE
    return NONE if value is None or value == "" else str(value)


def markdown_table(frame: pd.DataFrame, left: int) -> str:
    """Return a frame of text as a markdown table, its first ``left`` columns aligned left."""
    alignment = ["left"] * left + ["right"] * (len(frame.columns) - left)
    # As text: tabulate would otherwise take "1.00" for a number and print 1.
    text = frame.to_markdown(
        index=False, colalign=alignment[: len(frame.columns)], disable_numparse=True
    )
    return str(text)
