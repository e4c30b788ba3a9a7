"""The section ``parity`` of a suite with its names found among the suite's cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bench.case import Case
from bench.errors import MembenchError, nearest
from bench.globs import Globs, choose
from bench.suite.document import Mistake, Place
from bench.suite.parity_schema import Parity

__all__ = ["Figure", "Pair", "ParityPlan", "parity_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Runs whose curves stand in one picture."""

    title: str
    cases: tuple[Case, ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A run with a technique and the plain one it must follow; ``band`` None: to the bit."""

    plain: Case
    technique: Case
    band: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityPlan:
    """What is trained: the pictures' cases and the pairs'."""

    figures: tuple[Figure, ...]
    pairs: tuple[Pair, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every case once, the pictures' first."""
        shown = [case for figure in self.figures for case in figure.cases]
        paired = [case for pair in self.pairs for case in (pair.plain, pair.technique)]
        return tuple({case.name: case for case in (*shown, *paired)}.values())

    def matching(self, globs: Globs) -> ParityPlan:
        """Return the pictures' cases that a glob matches, and the pairs of which either does.

        Raises MembenchError where a glob matches no case.
        """
        chosen, missing = choose(self.cases, globs, lambda case: case.aliases)
        if missing is not None:
            near = nearest(missing, [case.name for case in self.cases])
            raise MembenchError(f"no case that parity trains matches {missing!r}{near}")
        wanted = {case.name for case in chosen}
        figures = (
            Figure(title=f.title, note=f.note, cases=tuple(c for c in f.cases if c.name in wanted))
            for f in self.figures
        )
        return ParityPlan(
            figures=tuple(figure for figure in figures if figure.cases),
            pairs=tuple(p for p in self.pairs if wanted & {p.plain.name, p.technique.name}),
        )


def parity_plan(parity: Parity, cases: Sequence[Case]) -> tuple[ParityPlan, list[Mistake]]:
    """Return what the section asks for, and what is wrong with it, each with its place."""
    mistakes = list(_schedule_mistakes(parity))
    figures = []
    for i, entry in enumerate(parity.figures):
        shown: dict[str, Case] = {}
        for j, glob in enumerate(entry.cases):
            place: Place = ("parity", "figures", i, "cases", j)
            found = _matching(glob, cases)
            mistakes += _wrong(place, glob, found, cases)
            shown |= {case.name: case for case in found}
        figures.append(Figure(title=entry.title, cases=tuple(shown.values()), note=entry.note))
    pairs = []
    for i, pair in enumerate(parity.pairs):
        place = ("parity", "pairs", i)
        plain, technique = _matching(pair.plain, cases), _matching(pair.technique, cases)
        wrong = [
            *_wrong((*place, "plain"), pair.plain, plain, cases, one=True),
            *_wrong((*place, "technique"), pair.technique, technique, cases, one=True),
        ]
        if not wrong:
            made = Pair(plain=plain[0], technique=technique[0], band=pair.band)
            wrong = list(_pair_mistakes(place, made))
            pairs.append(made)
        mistakes += wrong
    return ParityPlan(figures=tuple(figures), pairs=tuple(pairs)), mistakes


def _matching(glob: str, cases: Iterable[Case]) -> list[Case]:
    return [case for case in cases if any(fnmatchcase(alias, glob) for alias in case.aliases)]


def _wrong(
    place: Place, glob: str, found: Sequence[Case], cases: Sequence[Case], one: bool = False
) -> list[Mistake]:
    if not found:
        near = nearest(glob, [case.name for case in cases])
        return [Mistake(place, f"no case matches {glob!r}{near}")]
    if one and len(found) > 1:
        return [Mistake(place, f"{glob!r} must match one case, it matches {len(found)}")]
    untrainable = ((case, _why_not(case)) for case in found)
    return [Mistake(place, f"case {case.name} {why}") for case, why in untrainable if why]


def _why_not(case: Case) -> str:
    """Return why a case cannot be trained on a labelled volume, nothing if it can."""
    from memsave.networks import find_network

    if case.imported is not None:
        return "is of a network of your own: only memsave's can be compared"
    spec = find_network(case.network)
    channels = case.network_options.get("in_channels", spec.in_channels)
    if case.mode != "train":
        return f"is of mode {case.mode}: only training can be compared"
    if spec.spatial_dims != 3 or spec.target != "classes" or channels != 1:
        return "cannot train on a labelled volume: that takes a 3D network of 1 channel and classes"
    return ""


def _pair_mistakes(place: Place, pair: Pair) -> Iterable[Mistake]:
    from bench.named_workload import is_exact

    if pair.plain.name == pair.technique.name:
        yield Mistake(place, f"compares {pair.plain.name} with itself")
    elif (pair.plain.shape, pair.plain.batch_size) != (
        pair.technique.shape,
        pair.technique.batch_size,
    ):
        yield Mistake(place, "compares cases of two shapes or batch sizes, which see other crops")
    elif pair.band is None and not (
        is_exact(pair.technique) and pair.plain.precision == pair.technique.precision
    ):
        yield Mistake(place, f"{pair.technique.variant} is not exact: state a band of its loss")


def _schedule_mistakes(parity: Parity) -> Iterable[Mistake]:
    from bench.schedules import check_schedule

    try:
        check_schedule(parity.schedule.name, parity.schedule.options)
    except MembenchError as error:
        yield Mistake(("parity", "schedule"), str(error))
