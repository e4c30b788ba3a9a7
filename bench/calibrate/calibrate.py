"""One piece of a calibration: which GPU, what is left to measure, and where it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.calibrate.device_worker import BENCHMARK_VARIABLE
from bench.calibrate.gathering import gather
from bench.calibrate.section import Section, load_section, save_card
from bench.calibrate.session import Asked, Measurer, Session, Start, jobs_left
from bench.calibrate.wanted import Wanted, calibrated_cases, representatives
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
from bench.predict.shim import gpu_visible
from bench.runner import TimeLimit
from bench.units import MIB

__all__ = ["Outcome", "Settings", "calibrate", "card_of", "check_gpu", "start_measuring"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a user may choose. ``folder``: None is the folder of the user's own cards."""

    folder: Path | None = None
    suites: tuple[str, ...] | None = None
    limit_s: float = 540.0
    hold_out: float = 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the card was written, what it holds, and whether nothing is left to measure.

    ``untraced``: cases of which it is not known yet what they call.
    """

    path: Path
    card: Card
    section: Section
    complete: bool
    untraced: int = 0


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
    limit = TimeLimit.from_now(settings.limit_s)
    card = card_of(hello)
    path = (settings.folder or user_cards_folder()) / f"{card.name}.json"
    section = load_section(path, hello)
    cases = calibrated_cases(settings.suites)
    section.suites = tuple(sorted({*section.suites, *(settings.suites or ("all shipped",))}))
    section.remaining = max(section.remaining, 1)  # not complete until it is known to be
    save_card(card, section, path)  # a folder that cannot be written is found before the hour
    if wanted is None:
        wanted = gather(cases, settings.hold_out, limit)
    if wanted.untraced:
        return Outcome(path, card, section, complete=False, untraced=wanted.untraced)
    section.notes += [line for line in wanted.skipped if line not in section.notes]
    session = Session(section, start, lambda: _save(card, section, path), report)
    complete = session.run(jobs_left(section, wanted, representatives(cases)), limit.left_s())
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
