"""Runs the cases of a suite in child processes and appends a record as each one finishes.

A measured case gets a process of its own: a clean allocator, and a crash costs one case.
Predicted cases share warm workers. Whatever happens to a child (crash, hang, kill) becomes the
record of the case it was running, and the others go on.

A run may have a time limit, as a piece of a longer session has. It ends the case that is running
then: one that had a fair share of the run is recorded as ``timeout``, another is not recorded.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.case import Case
from bench.child import Child, ChildCrashError, ChildTimeoutError
from bench.errors import MembenchError
from bench.guard import Guard
from bench.record import (
    Environment,
    Evidence,
    Holder,
    Parts,
    Peaks,
    Record,
    append_record,
)
from bench.timeline import Timeline

__all__ = [
    "Backend",
    "Progress",
    "Run",
    "TimeLimit",
    "make_record",
    "make_writable",
    "run_cases",
    "usable_cores",
]

_FAIR_SHARE = 0.5  # of a run's time: a case that had less was not really tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """How cases are run: which module serves them, how many at once, and what they are told."""

    evidence: Evidence
    module: str  # run as ``python -m module``
    card: str  # the card the records are for
    workers: int
    reuse: bool  # one child for many cases
    child_environment: dict[str, str] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)  # sent with each case
    tracer: str | None = None
    capped_to: str | None = None
    exclusive: bool = False  # a measured case fails when another process is on its GPU
    worker_environments: tuple[dict[str, str], ...] = ()  # of each worker, beside the above
    notes: tuple[str, ...] = ()  # for every record
    warning: str = ""  # for whoever starts the run, "" when there is none


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """How long a run may take in all. ``ends_at`` is of ``time.monotonic``."""

    seconds: float
    ends_at: float

    @classmethod
    def from_now(cls, seconds: float) -> TimeLimit:
        """Return a limit of which all is left."""
        return cls(seconds, time.monotonic() + seconds)

    def left_s(self) -> float:
        """Return what is left, 0 when it is over."""
        return max(0.0, self.ends_at - time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Cases, how to run them, and where their records go."""

    cases: Sequence[Case]
    backend: Backend
    environment: Environment
    path: Path
    limit: TimeLimit | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress bar needs to know: a case has begun, or has ended with a record."""

    case: Case
    record: Record | None


def run_cases(run: Run, on_progress: Callable[[Progress], None]) -> list[Record]:
    """Run every case, append each record as it comes, and return them in the order of the cases.

    Cases that the run's time limit left no time for have no record. ``on_progress`` is called from
    one thread at a time. On KeyboardInterrupt the children are ended and the interrupt goes on to
    the caller; what has finished is in the file.
    """
    make_writable(run.path)
    records: dict[int, Record] = {}
    waiting: queue.SimpleQueue[tuple[int, Case]] = queue.SimpleQueue()
    for item in enumerate(run.cases):
        waiting.put(item)
    lock = threading.Lock()
    stop = threading.Event()
    failures: list[BaseException] = []

    def report(index: int, case: Case, record: Record | None) -> None:
        with lock:
            if record is not None:
                append_record(run.path, record)
                records[index] = record
            on_progress(Progress(case, record))

    def work(place: int) -> None:
        with _children(run.backend, place) as child:
            while not stop.is_set() and (run.limit is None or run.limit.left_s() > 0):
                try:
                    index, case = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    report(index, case, None)
                    record = _run_case(run, case, child)
                    if record is not None:
                        report(index, case, record)
                except BaseException as error:  # handed to the caller, below
                    failures.append(error)
                    stop.set()

    count = max(1, min(run.backend.workers, len(run.cases)))
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # a bare join would not see Ctrl-C
    except KeyboardInterrupt:
        stop.set()
        raise
    if failures:
        raise failures[0]
    return [records[index] for index in sorted(records)]


def make_writable(path: Path) -> None:
    """Make the folder of a results file, or raise MembenchError saying why it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise MembenchError(
            f"cannot write results to {path}: {error.strerror or error}; "
            "choose another folder with --results"
        ) from None


class _ChildSlot:
    """A child that is started when first needed and again after it died."""

    def __init__(self, backend: Backend, place: int) -> None:
        self._backend = backend
        own = backend.worker_environments[place] if backend.worker_environments else {}
        self._environment = {**backend.child_environment, **own}
        self._child: Child | None = None

    def get(self) -> Child:
        if self._child is None:
            self._child = Child(self._backend.module, self._environment)
        return self._child

    def drop(self) -> None:
        """End a child that cannot be trusted any more."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def finish(self) -> None:
        """End a child that has answered all it was asked."""
        if self._child is not None:
            self._child.finish()
            self._child = None


@contextmanager
def _children(backend: Backend, place: int) -> Iterator[_ChildSlot]:
    slot = _ChildSlot(backend, place)
    try:
        yield slot
    finally:
        slot.finish()


def _run_case(run: Run, case: Case, slot: _ChildSlot) -> Record | None:
    """Run one case; None where the run's time limit ended it before it had a fair share."""
    environment, guard, limit_s = run.environment, None, case.time_limit_s
    try:
        child = slot.get()
        environment = _with_hello(environment, child.hello)
        guard = Guard(child, run.backend.exclusive)
        if run.limit is not None:
            limit_s = min(limit_s, run.limit.left_s())
        readings = guard.refusal() or child.ask(
            {"case": case.to_definition(), **run.backend.request}, limit_s
        )
    except ChildTimeoutError as error:
        slot.drop()
        readings = {"status": "timeout", "reason": str(error)}
    except ChildCrashError as error:
        slot.drop()
        readings = {"status": "failed", "reason": str(error)}
    if not run.backend.reuse:
        slot.finish()
    if guard is not None:
        readings = guard.judged(readings)
    if run.limit is not None and readings["status"] == "timeout" and limit_s < case.time_limit_s:
        if limit_s < run.limit.seconds * _FAIR_SHARE:
            return None
        readings["reason"] += f", what was left of the run's time limit of {run.limit.seconds:g} s"
    return make_record(run.backend, case, readings, environment)


def _with_hello(environment: Environment, hello: dict[str, Any]) -> Environment:
    """Take over what only the child knows, as the versions that it really imported."""
    known = {f.name for f in dataclasses.fields(Environment)}
    return dataclasses.replace(
        environment, **{k: v for k, v in hello.items() if k in known and v is not None}
    )


def make_record(
    backend: Backend, case: Case, readings: dict[str, Any], environment: Environment
) -> Record:
    """Return the record of a case that gave ``readings``, as a child answers them."""
    from bench.named_workload import is_exact, technique_names

    values = dict(readings)
    values["parts"] = Parts(**values.get("parts", {}))
    values["phases"] = {k: Peaks(**v) for k, v in values.get("phases", {}).items()}
    values["peak_holders"] = tuple(Holder(**h) for h in values.get("peak_holders", ()))
    timeline = values.get("timeline")
    values["timeline"] = Timeline.from_dict(timeline) if timeline else None
    for key in ("uncalibrated", "step_times_s"):
        values[key] = tuple(values.get(key, ()))
    notes = (*environment.notes, *values.pop("notes", ()), *backend.notes)
    return Record(
        case=case.name,
        network=case.network,
        variant=case.variant,
        techniques=technique_names(case),
        exact=is_exact(case),
        precision=case.precision,
        shape=case.shape,
        requested_shape=case.requested_shape,
        mode=case.mode,
        batch_size=case.batch_size,
        evidence=backend.evidence,
        tracer=backend.tracer,  # type: ignore[arg-type]
        card=backend.card,
        capped_to=backend.capped_to,
        definition=case.to_definition(),
        environment=dataclasses.replace(
            environment, notes=notes, seed=case.seed, cudnn_benchmark=case.cudnn_benchmark
        ),
        volumes=case.volumes,
        **values,
    )


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
