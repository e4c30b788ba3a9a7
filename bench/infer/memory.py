"""The memory of each stage: measured as the pipeline runs on a GPU, predicted where it does not.

A stage's figures stand for themselves: the pipeline gives its cached blocks back between the
stages, so what it needs is the larger of the two, whether measured or predicted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import nvml
from bench.backends import predicted_backend
from bench.child import Child, ChildCrashError, ChildTimeoutError
from bench.errors import MembenchError
from bench.infer.stages import STAGES
from bench.predict.cards import Card
from bench.record import Evidence, Status
from bench.units import format_bytes

if TYPE_CHECKING:
    from bench.cuda import Cuda

__all__ = ["CudaMeter", "OutOfMemoryError", "StageMemory", "predict_stages"]


class OutOfMemoryError(MembenchError):
    """A stage did not fit the GPU; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """What a stage needs of the card. ``reason`` is empty if and only if ``status`` is "ok".

    allocated <= reserved <= process, the peaks in bytes; ``needs_bytes``: the smallest capacity of
    the caching allocator with which a predicted stage completes. None: not known.
    """

    stage: str
    evidence: Evidence
    status: Status
    reason: str
    tracer: str | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    process_bytes: int | None = None
    needs_bytes: int | None = None
    uncalibrated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def predict_stages(card: Card) -> tuple[StageMemory, ...]:
    """Return what each stage needs of ``card``, traced in a process of its own.

    A stage that cannot be traced is ``failed`` and says why; the other is predicted all the same.
    """
    backend, why = predicted_backend(card)
    notes = (f"traced on the CPU, not as on CUDA: {why}",) if backend.tracer == "cpu" else ()
    with _Worker(backend.module, backend.child_environment) as worker:
        return tuple(
            _predicted(
                stage.name,
                worker.ask({"case": stage.case().to_definition(), **backend.request}),
                backend.tracer,
                notes,
            )
            for stage in STAGES
        )


def _predicted(
    stage: str, readings: dict[str, Any], tracer: str | None, notes: tuple[str, ...]
) -> StageMemory:
    return StageMemory(
        stage=stage,
        evidence="predicted",
        status=readings["status"],
        reason=readings["reason"],
        tracer=tracer,
        peak_allocated_bytes=readings.get("peak_allocated_bytes"),
        peak_reserved_bytes=readings.get("peak_reserved_bytes"),
        process_bytes=readings.get("process_bytes"),
        needs_bytes=readings.get("needs_bytes"),
        uncalibrated=tuple(readings.get("uncalibrated", ())),
        notes=notes,
    )


class _Worker:
    """A child for both stages, started again for the second if the first ended it."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        self._start = (module, environment)
        self._child: Child | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.finish()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the readings; a child that died or hung gives ``failed`` or ``timeout``."""
        try:
            self._child = self._child or Child(*self._start)
            return self._child.ask(request, request["case"]["time_limit_s"])
        except (ChildCrashError, ChildTimeoutError) as error:
            self._child = None  # it is gone
            timeout = isinstance(error, ChildTimeoutError)
            return {"status": "timeout" if timeout else "failed", "reason": str(error)}


class CudaMeter:
    """Reads the GPU's memory while ``Pipeline`` runs; ``stage`` is its ``around``.

    ``used_before_bytes``: what NVML said was in use on the device before this process used it, for
    where the driver does not tell processes apart.
    """

    def __init__(self, cuda: Cuda, used_before_bytes: int | None) -> None:
        self._cuda = cuda
        self._used_before_bytes = used_before_bytes
        self._readings: list[StageMemory] = []

    @property
    def readings(self) -> tuple[StageMemory, ...]:
        """The stages that have run, in order."""
        return tuple(self._readings)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage and give its cached blocks back.

        Errors: OutOfMemoryError when it does not fit.
        """
        import torch

        self._cuda.reset_peak_memory_stats()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(self._refusal(name, str(error))) from None
        self._cuda.synchronize()
        self._readings.append(self._read(name))
        torch.cuda.empty_cache()

    def _read(self, name: str) -> StageMemory:
        stats = self._cuda.memory_stats()
        reserved = stats["reserved_bytes.all.current"]
        notes: list[str] = []
        process = nvml.best_process_bytes(
            self._cuda.uuid,
            os.getpid(),
            reserved_bytes=reserved,
            used_before_bytes=self._used_before_bytes,
            notes=notes,
        )
        peak = stats["reserved_bytes.all.peak"]
        return StageMemory(
            stage=name,
            evidence="measured",
            status="ok",
            reason="",
            peak_allocated_bytes=stats["allocated_bytes.all.peak"],
            peak_reserved_bytes=peak,
            # Others who left meanwhile may make the device's difference less than is ours.
            process_bytes=None if process is None else max(0, process - reserved) + peak,
            notes=tuple(notes),
        )

    def _refusal(self, name: str, text: str) -> str:
        allocated = self._cuda.memory_stats()["allocated_bytes.all.peak"]
        return (
            f"out of memory in stage {name}, {format_bytes(allocated)} allocated at the peak: "
            f"{text.splitlines()[0].rstrip('.')[:200]}; use --device cpu"
        )
