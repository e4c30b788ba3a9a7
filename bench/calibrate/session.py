"""A calibration from beginning to end, in as many pieces as it takes.

What is measured is written every few seconds, so a piece may be cut off anywhere and the next one
goes on where it stopped. A call that ends the process costs that call alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from bench.calibrate.section import Section
from bench.calibrate.wanted import Wanted
from bench.case import Case
from bench.child import ChildCrashError, ChildTimeoutError
from bench.predict.library_calls import ConvolutionCall, OperatorCall

__all__ = ["Asked", "Job", "Measurer", "Session", "jobs_left"]

_CALL_LIMIT_S = 120.0
_SAVE_EVERY_S = 10.0


class Measurer(Protocol):
    """A process that measures: ``bench.child.Child`` on ``bench.calibrate.device_worker``."""

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Return the reading that ``request`` asks for."""

    def finish(self) -> None:
        """End it, idle as it is."""


Start = Callable[[bool], Measurer]
"""Start a fresh process with ``cudnn.benchmark`` on or off."""


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to measure. ``fresh``: only a process that has done nothing yet will do."""

    request: dict[str, Any]
    benchmark: bool
    keep: Callable[[dict[str, Any]], None]
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """Progress: ``done`` of ``total`` have been measured."""

    done: int
    total: int


def jobs_left(section: Section, wanted: Wanted, networks: Sequence[Case]) -> list[Job]:
    """Return what is not measured yet: contexts, then calls without benchmark, then with it."""
    jobs = [_context(section, case) for case in networks if not _has_context(section, case)]
    for benchmark in (False, True):
        jobs += _convolutions(section.readings, wanted.convolutions, benchmark)
        if not benchmark:
            jobs += [_operator(section, c) for c in wanted.operators if not section.has_operator(c)]
        jobs += _convolutions(section.held_out, wanted.held_out, benchmark)
    return jobs


def _network(case: Case) -> str:
    return f"{case.network}/{case.precision}"


def _has_context(section: Section, case: Case) -> bool:
    return _network(case) in section.context.get("tried", ())


def _context(section: Section, case: Case) -> Job:
    def keep(reading: dict[str, Any]) -> None:
        section.add_context(_network(case), reading)

    return Job({"context": case.to_definition()}, case.cudnn_benchmark, keep, fresh=True)


def _convolutions(
    into: dict[tuple[ConvolutionCall, bool], dict[str, Any]],
    calls: Sequence[ConvolutionCall],
    benchmark: bool,
) -> Iterator[Job]:
    for call in calls:
        if (call, benchmark) not in into:

            def keep(reading: dict[str, Any], call: ConvolutionCall = call) -> None:
                into[(call, benchmark)] = reading

            yield Job({"convolution": call.to_dict()}, benchmark, keep)


def _operator(section: Section, call: OperatorCall) -> Job:
    return Job({"operator": call._asdict()}, False, lambda r: section.add_operator(call, r))


@dataclass(slots=True)
class Session:
    """Runs jobs until they are done or the time is over."""

    section: Section
    start: Start
    save: Callable[[], None]
    report: Callable[[Asked], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    _process: Measurer | None = field(default=None, init=False)
    _benchmark: bool = field(default=False, init=False)

    def run(self, jobs: Sequence[Job], limit_s: float) -> bool:
        """Measure, at least one job a piece; return whether all are done. Saves at the end too."""
        began = saved = self.clock()
        self.section.remaining = len(jobs)
        self.section.measured_at = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            for done, job in enumerate(jobs):
                now = self.clock()
                if done and now - began >= limit_s:
                    break
                if now - saved >= _SAVE_EVERY_S:
                    self.save()
                    saved = now
                job.keep(self._measured(job))
                self.section.remaining = len(jobs) - done - 1
                self.report(Asked(done + 1, len(jobs)))
        finally:
            self._end()
            self.save()
        return self.section.remaining == 0

    def _measured(self, job: Job) -> dict[str, Any]:
        if job.fresh or self._process is None or self._benchmark != job.benchmark:
            self._end()
            self._process, self._benchmark = self.start(job.benchmark), job.benchmark
        try:
            reading = self._process.ask(job.request, _CALL_LIMIT_S)
        except (ChildCrashError, ChildTimeoutError) as error:
            self._process = None
            return {"skipped": str(error)}
        if reading.get("status") == "failed":  # of ``bench.serve``: its context may be gone
            self._end()
            return {"skipped": str(reading["reason"])}
        if job.fresh:
            self._end()
        return reading

    def _end(self) -> None:
        if self._process is not None:
            self._process.finish()
            self._process = None
