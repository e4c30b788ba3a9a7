"""What the suites' cases call, found by tracing each; kept case by case for the next piece.

A piece of a calibration may end before all cases are traced. What it has traced is in membench's
cache folder, a line a case, and the next piece traces the others; what other code traced is not
taken.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.calibrate.wanted import Wanted, wanted_calls
from bench.case import Case
from bench.child import Child, ChildTimeoutError
from bench.errors import MembenchError
from bench.predict.shim import cache_folder, choose_tracer
from bench.record import append_line
from bench.runner import TimeLimit, usable_cores

__all__ = ["gather"]

_TRACE_LIMIT_S = 300.0
_TRACERS_LIMIT = 8
_BENCH = Path(__file__).resolve().parents[1]
_PACKAGES = (_BENCH, _BENCH.with_name("memsave"))
Answer = dict[str, Any]


def gather(cases: Sequence[Case], share: float, limit: TimeLimit | None = None) -> Wanted:
    """Return what the cases call; ``untraced`` of them there was no time for.

    ``share`` of the input shapes is held out. Raises MembenchError where the cache takes no more.
    """
    tracer, _ = choose_tracer()
    traced = _Traced(cache_folder() / f"calibration-calls-{_tracing(tracer)}.jsonl")
    missing = [case for case in cases if case.digest() not in traced.answers]
    if missing:
        count = min(usable_cores(), _TRACERS_LIMIT, len(missing))
        _Tracers(tracer, limit, traced).trace(missing, count)
    known = [case for case in cases if case.digest() in traced.answers]
    return wanted_calls(
        known, lambda case: traced.answers[case.digest()], share, untraced=len(cases) - len(known)
    )


@dataclass(slots=True)
class _Traced:
    """Answers by the digest of their case, in a file that only grows."""

    path: Path
    answers: dict[str, Answer] = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self.answers = dict(_lines(self.path))

    def keep(self, case: Case, answer: Answer) -> None:
        with self._lock:
            self.answers[case.digest()] = answer
            try:
                append_line(self.path, json.dumps([case.digest(), answer]))
            except OSError as error:
                raise MembenchError(
                    f"cannot keep what was traced in {self.path}: {error.strerror or error}"
                ) from None


def _lines(path: Path) -> list[tuple[str, Answer]]:
    """Return the whole lines of a file; one that was cut off, or no file, is traced again."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        try:
            digest, answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(digest, str) and isinstance(answer, dict):
            found.append((digest, answer))
    return found


@dataclass(slots=True)
class _Tracers:
    """Children that trace, one for each thread."""

    tracer: str
    limit: TimeLimit | None
    traced: _Traced
    _local: threading.local = field(default_factory=threading.local, init=False)
    _children: list[Child] = field(default_factory=list, init=False)

    def trace(self, cases: Sequence[Case], count: int) -> None:
        """Trace cases until all are, or the time is over."""
        pool = ThreadPoolExecutor(count)
        try:
            for _ in pool.map(self._trace, cases):
                pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, without what waits
            for child in self._children:
                child.close()  # which ends what a thread waits for
            pool.shutdown()

    def _trace(self, case: Case) -> None:
        left_s = _TRACE_LIMIT_S if self.limit is None else self.limit.left_s()
        if left_s <= 0:
            return
        try:
            if not hasattr(self._local, "child"):
                environment = {"MEMBENCH_WORKER_TRACER": self.tracer, "OMP_NUM_THREADS": "1"}
                self._local.child = Child("bench.predict.worker", environment)
                self._children.append(self._local.child)
            request = {"case": case.to_definition(), "calls": True}
            answer = self._local.child.ask(request, min(left_s, _TRACE_LIMIT_S))
        except MembenchError as error:  # it crashed, or took too long: the others go on
            if hasattr(self._local, "child"):
                del self._local.child
            if isinstance(error, ChildTimeoutError) and left_s < _TRACE_LIMIT_S:
                return  # it did not have the time that a case may take
            answer = {"status": "failed", "reason": str(error)}
        self.traced.keep(case, answer)


def _tracing(tracer: str) -> str:
    """Return a name for all tracing that is done alike: by this code with this torch."""
    from bench.predict.shim import torch_build

    torch = torch_build()
    alike = hashlib.sha256(f"{tracer} {torch.version if torch else None}".encode())
    for package in _PACKAGES:
        for path in sorted(package.rglob("*.py")):
            alike.update(path.read_bytes())
    return alike.hexdigest()[:16]
