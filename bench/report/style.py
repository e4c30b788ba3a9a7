"""How plots look, in one place: measured is solid, predicted is hatched.

The colours are from the palette of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from typing import Any, Literal

from bench.record import Evidence

__all__ = [
    "CAPACITY_COLOUR",
    "GRID_COLOUR",
    "HATCHES",
    "LINE_COLOURS",
    "LINE_STYLES",
    "MARKERS",
    "NEEDS_COLOUR",
    "PAGE_COLOUR",
    "PAGE_COLOURS",
    "PAPER_COLOUR",
    "PART_COLOURS",
    "PART_LABELS",
    "RC",
    "SERIES_COLOURS",
    "TEXT_COLOUR",
    "series_look",
]

HATCHES: dict[Evidence, str] = {"measured": "", "predicted": "////"}
LINE_STYLES: dict[Evidence, Literal["-", "--"]] = {"measured": "-", "predicted": "--"}

# In the order in which they are stacked, from the axis: neighbours differ in lightness too, and
# what no tensor holds is grey. None is near white or near black, so that each is seen on both.
PART_COLOURS = {
    "parameter": "#0072B2",
    "gradient": "#CC79A7",
    "optimizer_state": "#8B5A2B",
    "input": "#44AA99",
    "activation": "#E69F00",
    "temporary": "#F0E442",
    "tensors": "#56B4E9",  # where nothing is known of whose they are
    "other": "#AA8FD8",  # a category of a later version
    "workspace": "#009E73",
    "allocator": "#BBBBBB",
    "context": "#777777",
}
PART_LABELS = {
    "parameter": "parameters",
    "gradient": "gradients",
    "optimizer_state": "optimizer state",
    "input": "inputs",
    "activation": "activations",
    "temporary": "temporaries",
    "other": "other categories",
    "allocator": "allocator's cache",
    "needs": "needed, does not fit",
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
GRID_COLOUR = "#E5E5E5"
PAGE_COLOUR = "#FFFFFF"
# The colours of a figure that are a page's own, which has others in the dark.
PAGE_COLOURS = {
    PAGE_COLOUR: "--page",
    TEXT_COLOUR: "--text",
    PAPER_COLOUR: "--ink",
    GRID_COLOUR: "--grid",
    NEEDS_COLOUR: "--needs",
    CAPACITY_COLOUR: "--card",
}

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib's own: the same picture on every machine
    "font.size": 9,
    "text.parse_math": False,  # a variant's name is no formula
    "text.color": TEXT_COLOUR,
    "axes.labelcolor": TEXT_COLOUR,
    "axes.edgecolor": TEXT_COLOUR,
    "xtick.color": TEXT_COLOUR,
    "ytick.color": TEXT_COLOUR,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "membench",  # the same ids in every run, so that a remade plot is the same file
}


def series_look(number: int) -> tuple[str, str]:
    """Return a colour and a marker for the ``number``-th of many: no pair twice among 49."""
    turn = number // len(SERIES_COLOURS)
    return SERIES_COLOURS[number % len(SERIES_COLOURS)], MARKERS[(number + turn) % len(MARKERS)]
