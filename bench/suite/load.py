"""A suite by its file or by its name, checked to the last case before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bench
from bench.case import Case
from bench.errors import MembenchError, SuiteError, nearest
from bench.globs import Globs, choose
from bench.suite.document import Document, Mistake, read_document
from bench.suite.expand import Requested, draft_cases, finish, suite_drafts
from bench.suite.figures import with_figures
from bench.suite.form import check_form
from bench.suite.names import Row, find_rows, name_mistakes
from bench.suite.parity import ParityPlan, parity_plan
from bench.suite.schema import SuiteFile

__all__ = ["Suite", "load_suite", "shipped_suites", "suite_json_schema"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite that has been read and found whole."""

    name: str  # the file's name without its ending
    source: Path
    digest: str  # of the file's bytes
    file: SuiteFile
    rows: tuple[Row, ...]
    own_cases: tuple[Case, ...]  # those of the suite's own shapes

    @property
    def title(self) -> str:
        """The headline of its table."""
        return self.file.title

    @property
    def description(self) -> str:
        """What it is for, in a few lines; may be empty."""
        return self.file.description

    @property
    def card(self) -> str | None:
        """The card to predict for unless the user names another."""
        return self.file.card

    @property
    def time_limit_s(self) -> float:
        """The time limit of a case that names none of its own; each Case carries its limit."""
        return self.file.time_limit_s

    @property
    def cudnn_benchmark(self) -> bool:
        """Whether cuDNN tries algorithms out; each Case carries it too."""
        return self.file.cudnn_benchmark

    @property
    def baseline(self) -> str | None:
        """The variant that ratios are taken to."""
        return self.file.baseline

    @property
    def citation(self) -> str | None:
        """The paper whose figures stand beside the cases."""
        return self.file.paper.citation if self.file.paper else None

    @property
    def paper_note(self) -> str:
        """What a reader must know to compare our figures with the paper's; may be empty."""
        return self.file.paper.note if self.file.paper else ""

    @property
    def unit(self) -> Literal["GB", "GiB"] | None:
        """The unit of the paper's figures: GB is 10^9 bytes, GiB 2^30."""
        return self.file.paper.unit if self.file.paper else None

    def parity(self) -> ParityPlan:
        """Return what ``membench parity`` trains.

        Raises MembenchError where the suite has no section ``parity``.
        """
        if self.file.parity is None:
            raise MembenchError(
                f"suite {self.name} says nothing of parity: give it a section parity, as "
                "suites/figure4.yaml has"
            )
        return parity_plan(self.file.parity, self.own_cases)[0]

    def cases(
        self, volumes: Path | None = None, spacing: str | None = None, glob: Globs = None
    ) -> list[Case]:
        """Return the suite's cases, each name once, in the order of the file.

        ``volumes``, a folder: the matrix at the shapes of its NIfTI files, padded and limited as
        the suite's ``volumes`` says, in place of its own shapes, single cases and paper figures.
        Files of one shape are one case. ``spacing``, ``"1.62,1.62,3.22"`` mm in x, y, slices,
        resamples those shapes. ``glob``, one or several, keeps the cases one of whose names
        matches; each glob must match one.

        Raises MembenchError for a folder or spacing of no use, and where no case is left.
        """
        if volumes is not None:
            cases: Sequence[Case] = self._volume_cases(volumes, spacing)
        elif spacing is not None:
            raise MembenchError("--spacing resamples volumes: give it together with --volumes")
        else:
            cases = self.own_cases
        chosen, missing = choose(cases, glob, lambda case: case.aliases)
        if missing is not None:
            near = nearest(missing, [case.name for case in cases])
            raise SuiteError(f"no case of suite {self.name} matches {missing!r}{near}")
        return chosen

    def _volume_cases(self, folder: Path, spacing: str | None) -> list[Case]:
        if self.file.matrix is None:
            raise SuiteError(f"suite {self.name} has no matrix to run at the shapes of volumes")
        shapes = _volume_shapes(self.file, folder, spacing)
        drafts, _ = draft_cases(self.file, self.rows, shapes)
        cases, mistakes = finish(self.file, drafts)
        if mistakes:  # only a network that is not 3D refuses a padded shape
            raise SuiteError(
                f"suite {self.name} cannot run at the shapes of {folder}: {mistakes[0].text}"
            )
        if not cases:
            raise SuiteError(f"suite {self.name} excludes every case at the shapes of {folder}")
        return cases


def _volume_shapes(file: SuiteFile, folder: Path, spacing: str | None) -> list[Requested]:
    from bench.volumes import find_volumes, parse_spacing, resample_shape

    millimetres = None if spacing is None else parse_spacing(spacing)
    names: dict[tuple[int, int, int], list[str]] = {}
    for volume in find_volumes(folder):
        shape = volume.shape if millimetres is None else resample_shape(volume, millimetres)
        names.setdefault(shape, []).append(volume.name)
    return [
        Requested(
            place=("volumes",),
            sides=shape,
            pad=True,
            limit=file.volumes.limit,
            volumes=tuple(of_shape),
        )
        for shape, of_shape in names.items()
    ]


def shipped_suites() -> dict[str, Path]:
    """Return the suites that come with membench by name, ``table1`` among them.

    They lie inside the package where it is installed, beside it in a source tree.
    """
    package = Path(bench.__file__).parent
    inside = package / "suites"
    folder = inside if inside.is_dir() else package.parent / "suites"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_suite(path_or_name: str) -> Suite:
    """Return the suite of a file, or the shipped suite of that name, wholly checked.

    Raises SuiteError, one line naming file, line and field, for the first mistake.
    """
    try:
        path = _find(path_or_name)
        content = path.read_bytes()
    except OSError as error:
        raise SuiteError(f"cannot read suite {path_or_name}: {error.strerror}") from None
    document = read_document(path, content)
    file = check_form(document)
    rows, mistakes = find_rows(file)
    _refuse(document, mistakes + name_mistakes(file))
    return Suite(
        name=path.stem,
        source=path,
        digest=hashlib.sha256(content).hexdigest()[:16],
        file=file,
        rows=tuple(rows),
        own_cases=tuple(_checked_cases(document, file, rows)),
    )


def _find(path_or_name: str) -> Path:
    path, shipped = Path(path_or_name), shipped_suites()
    if path.is_file() or path_or_name not in shipped:
        if not path.exists():
            near = nearest(path.stem, shipped)
            raise SuiteError(f"no suite file or shipped suite is called {path_or_name!r}{near}")
        return path
    return shipped[path_or_name]


def _checked_cases(document: Document, file: SuiteFile, rows: list[Row]) -> list[Case]:
    drafts, mistakes = suite_drafts(file, rows)
    cases, unfinished = finish(file, drafts)
    _refuse(document, mistakes + unfinished)
    cases, mistakes = with_figures(file, cases)
    variants = {case.variant for case in cases}
    if not cases:
        mistakes.append(Mistake(("exclude",), "leaves out every case of the suite"))
    elif file.baseline is not None and file.baseline not in variants:
        text = f"no case has variant {file.baseline!r}{nearest(file.baseline, variants)}"
        mistakes.append(Mistake(("baseline",), text))
    if file.parity is not None:
        mistakes += parity_plan(file.parity, cases)[1]
    _refuse(document, mistakes)
    return cases


def _refuse(document: Document, mistakes: Sequence[Mistake]) -> None:
    if mistakes:
        raise document.error(mistakes)


def suite_json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a suite file, for editors."""
    schema = SuiteFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
