"""How plots look, in one place: measured is solid, predicted is hatched.

The colours are from the palette of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from typing import Any

from bench.record import Evidence

__all__ = [
    "CAPACITY_COLOUR",
    "HATCHES",
    "LINE_COLOURS",
    "LINE_STYLES",
    "MARKERS",
    "NEEDS_COLOUR",
    "PAPER_COLOUR",
    "PART_COLOURS",
    "RC",
    "SERIES_COLOURS",
    "TEXT_COLOUR",
]

HATCHES: dict[Evidence, str] = {"measured": "", "predicted": "////"}
LINE_STYLES: dict[Evidence, str] = {"measured": "-", "predicted": "--"}

# In the order in which they are stacked, from the axis.
PART_COLOURS = {
    "tensors": "#56B4E9",
    "workspace": "#009E73",
    "allocator": "#F0E442",
    "context": "#CC79A7",
}
# Of curves, in the order in which a legend names them; the eighth begins again.
LINE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
NEEDS_COLOUR = "#D9D9D9"  # what a case that does not fit would need; not told apart by part
# Lines beside those of cards, whose colour is not among them, and the markers that go with them.
SERIES_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PAPER_COLOUR = "#000000"
CAPACITY_COLOUR = "#D55E00"
TEXT_COLOUR = "#333333"

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib's own: the same picture on every machine
    "font.size": 9,
    "text.parse_math": False,  # a variant's name is no formula
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "membench",  # the same ids in every run, so that a remade plot is the same file
}
