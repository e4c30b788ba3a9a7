"""What a calibration is to measure: the calls of the suites' cases, each once, largest last.

A share of the suites' input shapes is held out: calls that only those make are measured, but kept
apart, so that the error on shapes that a calibration never saw can be told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.case import Case
from bench.errors import MembenchError
from bench.predict.library_calls import ConvolutionCall, OperatorCall

__all__ = [
    "NEVER_CALIBRATED",
    "Wanted",
    "calibrated_cases",
    "held_out",
    "representatives",
    "wanted_calls",
]

NEVER_CALIBRATED = ("heldout",)
"""Suites whose networks a calibration must not have seen."""

AskCalls = Callable[[Case], dict[str, Any]]
"""What ``bench.predict.case_calls.case_calls`` gives for a case."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Calls in the order in which they are measured; ``held_out`` come last.

    ``skipped``: a line for each case that could not be traced. ``untraced``: how many cases there
    was no time to trace, whose calls are not among these.
    """

    convolutions: tuple[ConvolutionCall, ...]
    operators: tuple[OperatorCall, ...]
    held_out: tuple[ConvolutionCall, ...]
    skipped: tuple[str, ...] = ()
    untraced: int = 0


def calibrated_cases(suites: Sequence[str] | None = None) -> list[Case]:
    """Return the cases of the suites named, or of all that are shipped but for the held-out one.

    Networks of a user's own are left out. Raises MembenchError for a suite that is not there, or
    that must not be seen.
    """
    from bench.suite import load_suite, shipped_suites

    seen = [name for name in suites or () if name in NEVER_CALIBRATED]
    if seen:
        raise MembenchError(
            f"suite {seen[0]!r} is for networks that calibration never sees: leave it out"
        )
    names = suites or sorted(n for n in shipped_suites() if n not in NEVER_CALIBRATED)
    cases = [case for name in names for case in load_suite(name).cases()]
    return [case for case in cases if case.imported is None]


def held_out(case: Case, share: float) -> bool:
    """Whether a case's input shape is held out: the same for all variants of its network."""
    text = f"{case.network} {case.shape} {case.batch_size}"
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
    return place < share


def wanted_calls(cases: Iterable[Case], ask: AskCalls, share: float, untraced: int = 0) -> Wanted:
    """Return the calls of all cases, without those that differ in no shape, type or option."""
    convolutions: dict[ConvolutionCall, bool] = {}  # -> whether only held-out shapes make it
    operators: dict[OperatorCall, None] = {}
    skipped: list[str] = []
    for case in cases:
        calls = ask(case)
        if calls.get("status") == "failed":
            skipped.append(f"{case.name}: {calls['reason']}")
            continue
        apart = held_out(case, share)
        for data in calls["convolutions"]:
            call = ConvolutionCall.from_dict(data)
            convolutions[call] = apart and convolutions.get(call, True)
        if not apart:
            operators.update((OperatorCall(**data), None) for data in calls["operators"])
    by_size = sorted(convolutions, key=lambda call: (call.tensor_bytes, call))
    return Wanted(
        convolutions=tuple(call for call in by_size if not convolutions[call]),
        operators=tuple(sorted(operators, key=lambda call: (call.operand_bytes, call))),
        held_out=tuple(call for call in by_size if convolutions[call]),
        skipped=tuple(skipped),
        untraced=untraced,
    )


def representatives(cases: Iterable[Case]) -> list[Case]:
    """Return for each network and precision the case with the fewest voxels, training first.

    Its kernels are those whose code the context holds.
    """
    chosen: dict[tuple[str, str], tuple[tuple[bool, int], Case]] = {}
    for case in cases:
        voxels = case.batch_size
        for side in case.shape:
            voxels *= side
        rank = (case.mode != "train", voxels)
        key = (case.network, case.precision)
        if key not in chosen or rank < chosen[key][0]:
            chosen[key] = (rank, case)
    return [case for _, case in chosen.values()]
