"""One piece of a calibration: which GPU, what is left to measure, and where it is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.calibrate.device_worker import BENCHMARK_VARIABLE
from bench.calibrate.section import Section, load_section, save_card
from bench.calibrate.session import Asked, Measurer, Session, Start, jobs_left
from bench.calibrate.wanted import Wanted, calibrated_cases, representatives, wanted_calls
from bench.case import Case
from bench.child import Child
from bench.errors import MembenchError
from bench.predict.cards import (
    Card,
    ConvolutionWorkspace,
    WorkspaceRule,
    all_cards,
    card_name_for_gpu,
    user_cards_folder,
)
from bench.predict.library_calls import ConvolutionCall, OperatorCall
from bench.predict.shim import cache_folder, choose_tracer, gpu_visible
from bench.runner import usable_cores
from bench.units import MIB

__all__ = ["Outcome", "Settings", "calibrate", "card_of", "check_gpu", "gather", "start_measuring"]

_TRACE_LIMIT_S = 600.0
_TRACERS_LIMIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a user may choose. ``folder``: None is the folder of the user's own cards."""

    folder: Path | None = None
    suites: tuple[str, ...] | None = None
    limit_s: float = 540.0
    hold_out: float = 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the card was written, what it holds, and whether nothing is left to measure."""

    path: Path
    card: Card
    section: Section
    complete: bool


def check_gpu() -> None:
    """Raise MembenchError, saying why, where there is no GPU to measure on."""
    visible, why = gpu_visible()
    if not visible:
        raise MembenchError(f"membench calibrate measures on a GPU, and here is none: {why}")


def calibrate(
    settings: Settings,
    report: Callable[[Asked], None],
    start: Start | None = None,
    hello: dict[str, Any] | None = None,
    wanted: Wanted | None = None,
) -> Outcome:
    """Measure for ``settings.limit_s``, from where the piece before stopped.

    ``start``, ``hello`` and ``wanted`` are the GPU's and the suites' unless a test gives its own.
    Raises MembenchError where there is no GPU, or where the card cannot be read or written.
    """
    start = start or start_measuring
    hello = hello or _greeting()
    began = time.monotonic()
    card = card_of(hello)
    path = (settings.folder or user_cards_folder()) / f"{card.name}.json"
    section = load_section(path, hello)
    cases = calibrated_cases(settings.suites)
    save_card(card, section, path)  # a folder that cannot be written is found before the hour
    section.suites = settings.suites or ("all shipped",)
    if wanted is None:
        wanted = gather(cases, settings.hold_out)
    section.notes += [line for line in wanted.skipped if line not in section.notes]
    session = Session(section, start, lambda: _save(card, section, path), report)
    left_s = settings.limit_s - (time.monotonic() - began)
    complete = session.run(jobs_left(section, wanted, representatives(cases)), left_s)
    return Outcome(path, save_card(card, section, path), section, complete)


def _save(card: Card, section: Section, path: Path) -> None:
    save_card(card, section, path)


def _greeting() -> dict[str, Any]:
    check_gpu()
    child = Child("bench.calibrate.device_worker")
    try:
        return child.hello
    finally:
        child.finish()


def start_measuring(benchmark: bool) -> Measurer:
    """Start a process on the GPU, ``cudnn.benchmark`` on or off."""
    return Child("bench.calibrate.device_worker", {BENCHMARK_VARIABLE: str(int(benchmark))})


def card_of(hello: dict[str, Any]) -> Card:
    """Return the card of a GPU: the one that is known by its name, or a new one made from it."""
    name = card_name_for_gpu(hello["gpu"], hello["memory_bytes"])
    known = all_cards().get(name)
    if known is not None:
        return known
    major, _, minor = hello["compute_capability"].partition(".")
    rule = WorkspaceRule(floor_bytes=32 * MIB, operand_fraction=0.5)
    return Card(
        name=name,
        model=hello["gpu"],
        compute_capability=(int(major), int(minor)),
        memory_bytes=hello["memory_bytes"],
        memory_source="CUDA's total on the GPU that was calibrated",
        context_bytes=512 * MIB,
        context_source="Estimate, not measured: no card file and no reading of the driver's",
        convolution_workspace=ConvolutionWorkspace(
            float32=rule, half=rule, source="Estimate, not measured: that of the newer cards"
        ),
    )


def gather(cases: Sequence[Case], share: float) -> Wanted:
    """Return what the cases call, by tracing each; kept in the cache for the next piece."""
    tracer, _ = choose_tracer()
    text = json.dumps([tracer, share, *(case.digest() for case in cases), _versions()])
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_folder() / f"calibration-calls-{name}.json"
    kept = _read_wanted(path)
    if kept is not None:
        return kept
    local, children = threading.local(), list[Child]()

    def ask(case: Case) -> dict[str, Any]:
        if not hasattr(local, "child"):
            environment = {"MEMBENCH_WORKER_TRACER": tracer, "OMP_NUM_THREADS": "1"}
            local.child = Child("bench.predict.worker", environment)
            children.append(local.child)
        request = {"case": case.to_definition(), "calls": True}
        try:
            reply: dict[str, Any] = local.child.ask(request, _TRACE_LIMIT_S)
        except MembenchError as error:  # it crashed, or took too long: the others go on
            del local.child
            return {"status": "failed", "reason": str(error)}
        return reply

    try:
        with ThreadPoolExecutor(min(usable_cores(), _TRACERS_LIMIT)) as pool:
            answers = dict(zip((c.digest() for c in cases), pool.map(ask, cases), strict=True))
    finally:
        for child in children:
            child.finish()
    wanted = wanted_calls(cases, lambda case: answers[case.digest()], share)
    path.write_text(json.dumps(dataclasses.asdict(wanted)), encoding="utf-8")
    return wanted


def _versions() -> list[str | None]:
    from bench import __version__
    from bench.predict.shim import torch_build

    torch = torch_build()
    return [__version__, torch.version if torch else None]


def _read_wanted(path: Path) -> Wanted | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Wanted(
            convolutions=tuple(_convolution(row) for row in data["convolutions"]),
            operators=tuple(OperatorCall(*row) for row in data["operators"]),
            held_out=tuple(_convolution(row) for row in data["held_out"]),
            skipped=tuple(data["skipped"]),
        )
    except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off: made again
        return None


def _convolution(row: list[Any]) -> ConvolutionCall:
    return ConvolutionCall.from_dict(dict(zip(ConvolutionCall._fields, row, strict=True)))
