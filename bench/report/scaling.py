"""Memory against input size, as a table: bytes a voxel, and where each size of card ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.report.cells import NONE, STAR, shape_text, size_text
from bench.report.grids import escaped, markdown_table
from bench.report.markup import MARKDOWN, Markup
from bench.report.rows import Table
from bench.scaling import CARD_GIB, Series, largest_shape, make_series
from bench.shapes import Shape
from bench.units import GIB

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SCALING_NOTES",
    "compared_by_size",
    "scaling_grid",
    "scaling_series",
    "scaling_text",
    "side_text",
]

MANY_SIZES = 6
"""From so many sizes of one variant on, a table is about sizes, and is reported so."""

_FAR = 2.0  # a line is not believed beyond so many times the voxels that were run


_NOTES = (
    (
        "A line, fixed + bytes a voxel x voxels, is fitted to what each size needs (context "
        "included). off by up to: its largest deviation at a size that was run, most of it the "
        "allocator's steps."
    ),
    (
        "Columns of cards: the largest cube, or square, or number of slices, by that line. "
        f"{STAR}: larger than any size that was run. >: the largest that was run fits, and so "
        f"would {_FAR:g} times its voxels, past which no line is believed. {NONE}: not even the "
        "smallest. GiB = 2^30 bytes; a card gives a little less than its name says."
    ),
)
SCALING_NOTES = "\n".join(f"- {escaped(note)}" for note in _NOTES)
"""What a reader must know to read ``scaling_grid``, as markdown."""


def scaling_series(table: Table) -> list[Series]:
    """Return the series of a table that have enough sizes for a line."""
    return [series for series in make_series(r.record for r in table.rows) if series.line]


def compared_by_size(table: Table) -> bool:
    """Whether a table sets one variant beside itself at six sizes or more."""
    return any(len(series.points) >= MANY_SIZES for series in scaling_series(table))


def scaling_grid(series: Sequence[Series], markup: Markup = MARKDOWN) -> pd.DataFrame:
    """Return a row for each series: its line, how far it misses, the largest input of each card."""
    import pandas as pd

    return pd.DataFrame([_row(one, markup) for one in series])


def _row(series: Series, markup: Markup) -> dict[str, str]:
    from memsave.networks import find_network

    record, line = series.record, series.line
    assert line is not None
    row = {
        "network": record.network + f", batch {record.batch_size}" * (record.batch_size > 1),
        "variant": record.variant,
        "bytes a voxel": f"{line.bytes_per_voxel:,.0f}",
        "fixed": size_text(max(0, round(line.fixed_bytes))),
        "off by up to": f"{line.worst:.1%}".replace("%", " %"),
    }
    options = record.definition.get("network_options", {})
    ours = not record.definition.get("imported")  # what a network of the user's pools is not known
    divisor = find_network(record.network).divisor(options) if ours else (1,) * len(record.shape)
    for card in CARD_GIB:
        largest = largest_shape(series, card * GIB, divisor)
        row[f"{card} GiB"] = _largest_text(series, largest)
    return {name: markup.text(text) for name, text in row.items()}


def _largest_text(series: Series, largest: Shape | None) -> str:
    """Return the largest input; where the line leaves what was run far behind, only that."""
    if largest is None:
        return NONE
    ran = series.points[-1].shape
    beyond = math.prod(largest) / math.prod(ran)
    if beyond > _FAR:
        return f"> {side_text(ran)}"
    return side_text(largest) + STAR * (beyond > 1)


def side_text(shape: Shape) -> str:
    """Return ``96³`` or ``96²`` for equal sides, else ``512x512x320``."""
    if len(set(shape)) == 1 and len(shape) in (2, 3):
        return f"{shape[0]}{'²³'[len(shape) - 2]}"
    return shape_text(shape)


def scaling_text(table: Table) -> list[str]:
    """Return the paragraphs that say what each size of card holds."""
    return [
        f"### Largest input, {table.evidence}",
        markdown_table(scaling_grid(scaling_series(table)), left=2),
        SCALING_NOTES,
    ]
