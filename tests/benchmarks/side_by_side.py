"""Two ways to do one thing, timed in turns: what slows one down slows the other down too."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["TABLE", "Ratio", "compare", "skip_if_busy", "table_lines"]

Prepare = Callable[[], Callable[[], object]]
"""Makes fresh inputs, untimed, and returns what is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Median times of ours and theirs, and the median of the ratios round by round."""

    what: str
    theirs: str
    ours_s: float
    theirs_s: float
    ratio: float
    goal: float


TABLE: list[Ratio] = []


@dataclass(slots=True)
class _Times:
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)


def compare(
    benchmark: BenchmarkFixture,
    what: str,
    ours: Prepare,
    theirs: tuple[str, Prepare],
    *,
    goal: float,
    rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio | None:
    """Time both in turns, ours as the benchmark; None where benchmarks are disabled.

    The first two rounds are warm-up: compiled kernels, caches, the allocator's blocks.
    """
    times = _Times()

    def prepare_after_theirs() -> tuple[tuple[Callable[[], object]], dict[str, Any]]:
        times.theirs.append(_seconds(theirs[1](), clock))
        return (ours(),), {}

    def run(step: Callable[[], object]) -> None:
        times.ours.append(_seconds(step, clock))

    benchmark.pedantic(run, setup=prepare_after_theirs, rounds=rounds + 2, warmup_rounds=0)  # type: ignore[no-untyped-call]
    if not benchmark.stats:
        return None
    ours_s, theirs_s = times.ours[2:], times.theirs[2:]
    ratio = Ratio(
        what=what,
        theirs=theirs[0],
        ours_s=statistics.median(ours_s),
        theirs_s=statistics.median(theirs_s),
        ratio=statistics.median(a / b for a, b in zip(ours_s, theirs_s, strict=True)),
        goal=goal,
    )
    benchmark.extra_info.update(ratio=ratio.ratio, theirs_s=ratio.theirs_s, goal=goal)
    TABLE.append(ratio)
    return ratio


def _seconds(step: Callable[[], object], clock: Callable[[], float]) -> float:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    result = step()
    if cuda:
        torch.cuda.synchronize()
    end = clock()
    del result
    return end - start


def skip_if_busy() -> None:
    """Skip where others run on this machine: threads that wait for each other then wait long."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 1.25 * cores:
        pytest.skip(f"measured, not asserted: the load is {load:.1f} on {cores} cores")


def table_lines() -> list[str]:
    """Return the table of all ratios measured so far."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [f"measured on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    width = max(len(r.what) for r in TABLE)
    other = max(len(r.theirs) for r in TABLE)
    lines.append(f"{'ours':{width}}  {'against':{other}}  {'ours':>9}  {'theirs':>9}  ratio   goal")
    lines += [
        f"{r.what:{width}}  {r.theirs:{other}}  {r.ours_s * 1e3:6.1f} ms  {r.theirs_s * 1e3:6.1f}"
        f" ms  {r.ratio:5.2f}  {r.goal:5.2f}"
        for r in TABLE
    ]
    return lines
