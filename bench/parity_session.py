"""One ``membench parity``: from what the user asked to curves on disk, report and verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.case import Case
from bench.environment import read_environment
from bench.errors import MembenchError
from bench.globs import Globs
from bench.metrics import require_metrics
from bench.parity import (
    Comparison,
    Run,
    Training,
    check_fit,
    comparison_line,
    run_line,
    run_parity,
)
from bench.record import append_line
from bench.report.markdown import write_files
from bench.report.parity import comparison_text, findings, parity_files
from bench.report.results import CURVES_FOLDER
from bench.runner import make_writable
from bench.suite import Suite, load_suite
from bench.suite.parity import ParityPlan
from bench.training_data import LabelledVolume, mni152_head, read_labelled

__all__ = ["Outcome", "Request", "run_session"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asked for; ``image`` and ``labels`` None: the MNI152 head."""

    suite: str
    steps: int | None
    seed: int | None
    glob: Globs
    image: Path | None
    labels: Path | None
    output: Path
    results: Path
    command: str  # for the report: what makes it again


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it, and where it lies."""

    training: Training
    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...]
    findings: tuple[str, ...]
    curves: Path
    report: Path

    @property
    def passed(self) -> bool:
        """Whether every run came to its end and every technique stayed within its band."""
        return all(r.status == "ok" for r in self.runs) and all(c.inside for c in self.comparisons)


def run_session(
    request: Request,
    say: Callable[[str], None],
    on_line: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """Train, compare and report; ``say`` hears of progress, ``on_line`` gets each line of JSON.

    The curves are appended to ``results/parity/<suite>.<device>.jsonl`` as runs end.

    Raises MembenchError for what cannot be trained, read or written, before anything is trained.
    """
    if request.steps is not None and request.steps < 1:
        raise MembenchError(f"--steps must be 1 or more, got {request.steps}")
    if request.seed is not None and not 0 <= request.seed < 2**63:
        raise MembenchError(f"--seed must be 0 to 2^63 - 1, got {request.seed}")
    suite = load_suite(request.suite)
    plan = suite.parity().matching(request.glob) if request.glob else suite.parity()
    require_metrics()
    training = _training(suite, request)
    check_fit(plan.cases, training.volume)
    curves = request.results / CURVES_FOLDER / f"{suite.name}.{training.device}.jsonl"
    make_writable(curves)
    runs, comparisons = _train(suite, plan, training, curves, say, on_line)
    by_name = {run.case.name: run for run in runs}
    files = parity_files(suite.title, request.command, plan, runs, comparisons, training)
    write_files(request.output, files)
    return Outcome(
        training=training,
        runs=tuple(runs),
        comparisons=tuple(comparisons),
        findings=tuple(findings(plan, by_name, comparisons)),
        curves=curves,
        report=request.output / "parity.md",
    )


def _training(suite: Suite, request: Request) -> Training:
    settings = suite.file.parity
    assert settings is not None  # suite.parity() says so
    return Training(
        volume=_volume(request, settings.spacing_mm),
        settings=settings,
        steps=request.steps or settings.steps,
        seed=settings.seed if request.seed is None else request.seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def _volume(request: Request, spacing_mm: float) -> LabelledVolume:
    if request.image is None or request.labels is None:
        return mni152_head(spacing_mm)
    return read_labelled(request.image, request.labels, spacing_mm)


def _train(
    suite: Suite,
    plan: ParityPlan,
    training: Training,
    curves: Path,
    say: Callable[[str], None],
    on_line: Callable[[dict[str, Any]], None] | None,
) -> tuple[list[Run], list[Comparison]]:
    environment = dataclasses.asdict(
        read_environment(suite=suite.name, suite_hash=suite.digest, seed=training.seed)
    )
    environment["threads"] = torch.get_num_threads()
    total, runs, comparisons = len(plan.cases), list[Run](), list[Comparison]()

    def starting(case: Case) -> None:
        say(f"[{len(runs) + 1}/{total}] {case.name}")

    for result in run_parity(plan, training, starting):
        if isinstance(result, Run):
            runs.append(result)
            line = run_line(result, training)
            if result.status != "ok":
                say(f"{result.case.name}: {result.status}: {result.reason}")
        else:
            comparisons.append(result)
            line = comparison_line(result)
            if not result.inside:
                say(comparison_text(result))
        line = {**line, "suite": suite.name, "environment": environment}
        _append(curves, line)
        if on_line is not None:
            on_line(line)
    return runs, comparisons


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        append_line(path, json.dumps(line, allow_nan=False))
    except OSError as error:
        raise MembenchError(
            f"cannot write curves to {path}: {error.strerror or error}; "
            "choose another folder with --results"
        ) from None
