"""A paper's printed figures set beside the cases they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.case import Case
from bench.errors import nearest
from bench.shapes import format_shape
from bench.suite.document import Mistake
from bench.suite.schema import FigureEntry, Paper, SuiteFile

__all__ = ["with_figures"]


def with_figures(suite: SuiteFile, cases: Sequence[Case]) -> tuple[list[Case], list[Mistake]]:
    """Return ``cases`` with the figures of ``paper.figures``, and the figures that fit no case.

    A figure's variant is written ``variant``, or ``network/variant`` where two networks share it.
    """
    if suite.paper is None:
        return list(cases), [
            Mistake(("include", i, "paper"), "a figure needs the suite's paper: citation and unit")
            for i, entry in enumerate(suite.include)
            if entry.paper is not None
        ]
    found: dict[str, FigureEntry] = {}
    mistakes = []
    for variant, figures in suite.paper.figures.items():
        for shape, figure in figures.items():
            case = _find(suite.paper, variant, shape, cases)
            if isinstance(case, Mistake):
                mistakes.append(case)
            else:
                found[case.name] = figure
    return [
        dataclasses.replace(case, **suite.paper.of_case(found.get(case.name))) for case in cases
    ], mistakes


def _find(paper: Paper, variant: str, shape: str, cases: Sequence[Case]) -> Case | Mistake:
    """Return the one case that a figure belongs to, or what is wrong with the figure."""
    place = ("paper", "figures", variant, shape)
    of_mode = [case for case in cases if case.mode == paper.mode]
    of_variant = [c for c in of_mode if variant in (c.variant, f"{c.network}/{c.variant}")]
    if not of_variant:
        known = {case.variant for case in of_mode}
        text = f"no case of mode {paper.mode} has variant {variant!r}{nearest(variant, known)}"
        return Mistake(place[:-1], text)
    matches = [case for case in of_variant if format_shape(case.requested_shape) == shape]
    if not matches:
        known = {format_shape(case.requested_shape) for case in of_variant}
        return Mistake(place, f"no case of {variant!r} has this shape{nearest(shape, known)}")
    if len(matches) > 1:
        names = " or ".join(repr(f"{case.network}/{case.variant}") for case in matches)
        return Mistake(place[:-1], f"which network's figure is it? write {names}")
    return matches[0]
