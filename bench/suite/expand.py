"""From a suite's matrix, include and exclude to cases.

An axis (batch, precision) with more than one value adds a suffix to the variant wherever the value
is not the usual one (batch 1, fp32): ``ccblock+fp16+batch2``, so that no two cases have one name.
An entry that fixes its own batch, precision or mode takes no part in that axis.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bench.case import Case, Mode, Precision, TechniqueUse
from bench.errors import SuiteError
from bench.shapes import Shape, check_poolable, crop, format_shape, pad_to
from bench.suite.document import Mistake, Place
from bench.suite.names import Row
from bench.suite.schema import (
    ExcludeEntry,
    IncludeEntry,
    Matrix,
    NetworkEntry,
    ShapeEntry,
    SuiteFile,
)

__all__ = ["MAX_CASES", "Draft", "Requested", "draft_cases", "finish", "suite_drafts"]

MAX_CASES = 10_000
"""The most cases a suite may have: far above any table, below what would fill the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requested:
    """A shape as a suite's file or a volume asks for it, and what may be done to it."""

    place: Place
    sides: Shape
    pad: bool
    limit: tuple[int, int] | None  # of the in-plane sides
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A case before its shape is what the network sees."""

    row: Row
    requested: Requested
    variant: str
    mode: Mode
    batch: int
    precision: Precision


def suite_drafts(suite: SuiteFile, rows: Sequence[Row]) -> tuple[list[Draft], list[Mistake]]:
    """Return the drafts of the suite's own shapes: the matrix less ``exclude``, then ``include``.

    The mistakes are excludes that leave nothing out and a matrix beyond ``MAX_CASES``.
    """
    drafts: list[Draft] = []
    mistakes: list[Mistake] = []
    if suite.matrix is not None:
        shapes = [
            _requested(entry, ("matrix", "shapes", i))
            for i, entry in enumerate(suite.matrix.shapes)
        ]
        if _size(suite.matrix) > MAX_CASES:
            text = f"{_size(suite.matrix)} cases are over the limit of {MAX_CASES}"
            return [], [Mistake(("matrix",), text)]
        drafts, mistakes = draft_cases(suite, rows, shapes)
    for row in rows:
        if isinstance(row.entry, IncludeEntry):
            drafts.append(_single(row, row.entry))
    return drafts, mistakes


def _size(matrix: Matrix) -> int:
    rows = sum(len(entry.shapes or matrix.shapes) for entry in matrix.networks)
    return rows * len(matrix.batch) * len(matrix.precision) * len(matrix.mode)


def _requested(entry: ShapeEntry, place: Place) -> Requested:
    return Requested(place=place, sides=entry.sides, pad=entry.pad, limit=entry.limit)


def _single(row: Row, entry: IncludeEntry) -> Draft:
    return Draft(
        row=row,
        requested=_requested(entry.shape, (*row.place, "shape")),
        variant=entry.variant,
        mode=entry.mode or "train",
        batch=entry.batch or 1,
        precision=entry.precision or "fp32",
    )


def draft_cases(
    suite: SuiteFile, rows: Iterable[Row], shapes: Sequence[Requested]
) -> tuple[list[Draft], list[Mistake]]:
    """Return the matrix's rows at ``shapes``, less ``exclude``, and the excludes of no use."""
    matrix = suite.matrix
    assert matrix is not None
    drafts = [
        draft
        for row in rows
        if isinstance(row.entry, NetworkEntry)
        for requested in _row_shapes(row, row.entry, shapes)
        for draft in _row_drafts(matrix, row, row.entry, requested)
    ]
    used = {
        i for i, entry in enumerate(suite.exclude) for draft in drafts if _matches(entry, draft)
    }
    mistakes = [
        Mistake(("exclude", i), "leaves out no case of the matrix")
        for i in range(len(suite.exclude))
        if i not in used
    ]
    kept = [d for d in drafts if not any(_matches(entry, d) for entry in suite.exclude)]
    return kept, mistakes


def _row_shapes(row: Row, entry: NetworkEntry, shapes: Sequence[Requested]) -> Sequence[Requested]:
    """Return a row's shapes: its own in place of the suite's, none in place of volumes'."""
    if entry.shapes is None:
        return shapes
    if any(requested.volumes for requested in shapes):
        return ()
    places = ((*row.place, "shapes", i) for i in range(len(entry.shapes)))
    return [_requested(shape, place) for shape, place in zip(entry.shapes, places, strict=True)]


def _row_drafts(
    matrix: Matrix, row: Row, entry: NetworkEntry, requested: Requested
) -> Iterator[Draft]:
    modes = [entry.mode] if entry.mode else matrix.mode
    batches = [entry.batch] if entry.batch else matrix.batch
    precisions = [entry.precision] if entry.precision else matrix.precision
    for mode, batch, precision in itertools.product(modes, batches, precisions):
        variant = entry.variant
        if len(precisions) > 1 and precision != "fp32":
            variant += f"+{precision}"
        if len(batches) > 1 and batch != 1:
            variant += f"+batch{batch}"
        yield Draft(
            row=row,
            requested=requested,
            variant=variant,
            mode=mode,
            batch=batch,
            precision=precision,
        )


def _matches(exclude: ExcludeEntry, draft: Draft) -> bool:
    texts = {
        "network": draft.row.network,
        "variant": draft.variant,
        "shape": format_shape(draft.requested.sides),
        "mode": draft.mode,
        "precision": draft.precision,
    }
    globs = {key: getattr(exclude, key) for key in texts}
    return exclude.batch in (None, draft.batch) and all(
        fnmatchcase(texts[key], glob) for key, glob in globs.items() if glob is not None
    )


def finish(suite: SuiteFile, drafts: Iterable[Draft]) -> tuple[list[Case], list[Mistake]]:
    """Return the drafts as cases, and the mistakes: shapes of no use and names given twice."""
    cases: list[Case] = []
    mistakes: list[Mistake] = []
    first: dict[str, Draft] = {}
    for draft in drafts:
        try:
            case = _case(suite, draft)
        except SuiteError as error:
            mistakes.append(Mistake(draft.requested.place, str(error)))
            continue
        if case.name in first:
            mistakes.append(_given_twice(case.name, draft, first[case.name]))
        else:
            first[case.name] = draft
            cases.append(dataclasses.replace(case, position=len(cases)))
    return cases, mistakes


def _given_twice(name: str, draft: Draft, first: Draft) -> Mistake:
    """Point at the second row, or at the second shape where the row is one and the same."""
    text = f"case {name} is made here and already by"
    if draft.row is first.row:
        return Mistake(draft.requested.place, text, also=first.requested.place)
    return Mistake(draft.row.place, text, also=first.row.place)


def _case(suite: SuiteFile, draft: Draft) -> Case:
    entry = draft.row.entry
    training = entry.training or suite.training
    figure = entry.paper if isinstance(entry, IncludeEntry) else None
    return Case(
        network=draft.row.network,
        variant=draft.variant,
        requested_shape=draft.requested.sides,
        shape=_shape(draft.row, draft.requested),
        mode=draft.mode,
        batch_size=draft.batch,
        precision=draft.precision,
        network_options={} if draft.row.imported else entry.options,
        imported=draft.row.imported,
        techniques=tuple(TechniqueUse(name=t.name, options=t.options) for t in entry.techniques),
        loss=draft.row.loss,
        steps=training.steps,
        optimizer=training.optimizer.name,
        optimizer_options=training.optimizer.options,
        schedule=training.schedule.name if training.schedule else None,
        schedule_options=training.schedule.options if training.schedule else {},
        cudnn_benchmark=(
            suite.cudnn_benchmark if entry.cudnn_benchmark is None else entry.cudnn_benchmark
        ),
        time_limit_s=entry.time_limit_s or suite.time_limit_s,
        volumes=draft.requested.volumes,
        baseline=suite.baseline,
        card=entry.card,
        **(suite.paper.of_case(figure) if suite.paper else {}),
    )


def _shape(row: Row, requested: Requested) -> Shape:
    shape = requested.sides
    divisor = row.divisor[: len(shape)] if row.imported else row.divisor
    if row.spatial_dims and len(shape) != row.spatial_dims:
        raise SuiteError(
            f"{format_shape(shape)} has {len(shape)} sides, {row.network} takes {row.spatial_dims}"
        )
    if requested.limit is not None:
        shape = crop(shape, requested.limit)
    if requested.pad:
        return pad_to(shape, divisor)
    check_poolable(shape, divisor, row.network)
    return shape
