"""A paper's printed figures set beside the cases they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from bench.case import Case
from bench.errors import nearest
from bench.shapes import format_shape
from bench.suite.document import Mistake, Place
from bench.suite.names import Row
from bench.suite.schema import IncludeEntry, Paper, SuiteFile

__all__ = ["with_figures"]


def with_figures(
    suite: SuiteFile, rows: Iterable[Row], cases: Sequence[Case]
) -> tuple[list[Case], list[Mistake]]:
    """Return ``cases`` with their figures, and the figures that belong to none or to several.

    A figure's variant is written ``variant``, or ``network/variant`` where two networks share it.
    """
    figures = {place: text for place, text in _single_figures(rows)}
    if suite.paper is None:
        text = "a figure needs the suite's paper: citation and unit"
        return list(cases), [Mistake(place, text) for place in figures]
    paper, mistakes = suite.paper, []
    found: dict[str, str] = {}
    for variant, by_shape in paper.figures.items():
        for shape, figure in by_shape.items():
            of_variant = [case for case in cases if _is_of(case, variant, paper)]
            matches = [case for case in of_variant if _shape(case) == shape]
            if len(matches) == 1:
                found[matches[0].name] = figure
            else:
                mistakes.append(_unmatched(variant, shape, of_variant, cases))
    return cases_with, mistakes
