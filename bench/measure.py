"""Measurement: a case's steps on a real GPU, read by phase, as one record's readings.

The protocol is prediction's: build the workload, then ``case.steps`` steps, in a fresh process
and without ``empty_cache``. The allocator's peaks are reset as each phase begins, so a phase's
peaks are the highest over all its visits and the case's are the highest over all phases. Only
then are steps timed, in a pass of their own. Running out of memory is a result.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench import nvml
from bench.build_workload import build_workload
from bench.case import Case
from bench.cuda import Cuda
from bench.errors import MembenchError
from bench.record import Parts
from bench.units import format_bytes
from bench.workload import Workload
from memsave.streams import streams_for

__all__ = ["measure", "memory_fraction"]

_COUNTERS = {
    "peak_requested_bytes": "requested_bytes.all.peak",
    "peak_allocated_bytes": "allocated_bytes.all.peak",
    "peak_active_bytes": "active_bytes.all.peak",
    "peak_reserved_bytes": "reserved_bytes.all.peak",
}
# cuDNN and cuBLAS allocate for themselves too, and say so in words.
_OUT_OF_MEMORY = re.compile(r"out of memory|STATUS_ALLOC_FAILED", re.IGNORECASE)
# cuDNN's front end tries one plan after another and swallows each refusal of the allocator;
# what is left to see is this message, and the allocator's own count of refusals.
_NO_ENGINE = re.compile(r"unable to find an engine", re.IGNORECASE)
_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")

Peaks = dict[str, int | None]


@dataclass(slots=True)
class _Meter:
    """Reads the allocator's peaks phase by phase; ``mark`` is what a workload calls."""

    cuda: Cuda
    phase: str = ""
    step: int = 0
    phases: dict[str, Peaks] = field(default_factory=dict)

    def mark(self, phase: str) -> None:
        """End the phase before, begin this one."""
        self.read()
        self.phase = phase
        self.cuda.reset_peak_memory_stats()

    def read(self) -> None:
        """Add the peaks since the phase began to those of its earlier visits."""
        self.cuda.synchronize()
        if self.phase:
            stats = self.cuda.memory_stats()
            now: Peaks = {name: stats.get(key) for name, key in _COUNTERS.items()}
            self.phases[self.phase] = _highest([self.phases.get(self.phase, {}), now])

    def peaks(self) -> Peaks:
        """Return the highest counters of all phases."""
        return _highest(list(self.phases.values()))


def _highest(readings: list[Peaks]) -> Peaks:
    highest: Peaks = {}
    for name in _COUNTERS:
        known = [r[name] for r in readings if r.get(name) is not None]
        highest[name] = max(known) if known else None  # type: ignore[type-var]
    return highest


def measure(
    case: Case,
    cuda: Cuda,
    *,
    used_before_bytes: int | None = None,
    capacity_bytes: int | None = None,
) -> dict[str, Any]:
    """Return the fields of a measured record that the case and the GPU decide.

    ``used_before_bytes`` is what NVML said was in use on the device before this process had a
    context; ``capacity_bytes`` caps the caching allocator, as a smaller card would.

    Errors: MembenchError when the cap is more than the GPU has free. Anything that goes wrong in
    the workload, other than the GPU's memory running out, is raised.
    """
    torch.backends.cudnn.benchmark = case.cudnn_benchmark
    free_bytes, total_bytes = cuda.mem_get_info()
    if capacity_bytes is not None:
        _cap(cuda, capacity_bytes, free_bytes, total_bytes)
    meter = _Meter(cuda)
    host = streams_for(cuda.device).host
    host.reset_peak()
    notes: list[str] = []
    times: list[float] = []
    with _without_collections():
        workload, parameters, refusal = _memory_pass(case, meter)
        process = _read_process(cuda, used_before_bytes, meter.peaks(), notes)
        if workload is not None:
            times = _time_pass(case, workload, cuda, notes)
    capacity = total_bytes - process.context_bytes if capacity_bytes is None else capacity_bytes
    peaks = meter.peaks()
    return {
        "status": "ok" if refusal is None else "oom",
        "reason": "" if refusal is None else _reason(refusal, meter, capacity),
        "parameters": parameters,
        "capacity_bytes": capacity,
        "needs_bytes": None,
        **peaks,
        "process_bytes": process.peak_bytes if refusal is None else None,
        "peak_host_bytes": host.peak_bytes or None,
        "parts": asdict(_parts(peaks, process.context_bytes)),
        "uncalibrated": (),
        "phases": meter.phases,
        "peak_holders": (),
        "step_times_s": times,
        "notes": notes,
    }


def _memory_pass(
    case: Case, meter: _Meter
) -> tuple[Workload | None, int | None, RuntimeError | None]:
    """Build and step; return the workload if all of it fitted, the parameters, or the refusal."""
    refused_before = meter.cuda.memory_stats().get("num_ooms", 0)
    parameters = None
    try:
        workload = build_workload(case, meter.mark, meter.cuda.device)
        parameters = workload.parameter_count()
        for meter.step in range(1, case.steps + 1):
            workload.step(meter.mark)
        meter.read()
    except RuntimeError as error:
        refused = meter.cuda.memory_stats().get("num_ooms", 0) > refused_before
        if not _is_out_of_memory(error, refused):
            raise
        meter.read()
        return None, parameters, error.with_traceback(None)  # its frames hold the step's tensors
    return workload, parameters, None


def _is_out_of_memory(error: RuntimeError, refused: bool) -> bool:
    """Whether the GPU's memory ran out; ``refused``: the allocator has refused something."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return bool(_OUT_OF_MEMORY.search(text) or (refused and _NO_ENGINE.search(text)))


def _reason(error: RuntimeError, meter: _Meter, capacity_bytes: int) -> str:
    where = meter.phase + (f" of step {meter.step}" if meter.step else "")
    request = _REQUEST.search(str(error))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    what = f"tried to allocate {request[1]}" if request else lines[0].rstrip(".")[:200]
    allocated = meter.peaks()["peak_allocated_bytes"]
    reached = "" if allocated is None else f"; {format_bytes(allocated)} allocated at the peak"
    return f"out of memory in {where}: {what}{reached}, {format_bytes(capacity_bytes)} capacity"


def _time_pass(case: Case, workload: Workload, cuda: Cuda, notes: list[str]) -> list[float]:
    """Return the seconds of ``case.timed_steps`` steps after one that warms up."""
    if case.timed_steps == 0:
        return []
    refused_before = cuda.memory_stats().get("num_ooms", 0)
    try:
        workload.step(_not_marked)
        return [cuda.time_s(lambda: workload.step(_not_marked)) for _ in range(case.timed_steps)]
    except RuntimeError as error:  # a cache left fragmented; the memory pass stands
        if not _is_out_of_memory(error, cuda.memory_stats().get("num_ooms", 0) > refused_before):
            raise
        notes.append("step_times_s: the time pass ran out of memory")
        return []


def _not_marked(_phase: str) -> None:
    pass


# -- the process's memory -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Process:
    peak_bytes: int
    context_bytes: int  # what the process holds outside the caching allocator


def _read_process(
    cuda: Cuda, used_before_bytes: int | None, peaks: Peaks, notes: list[str]
) -> _Process:
    """Return the process's memory at its peak.

    The allocator gives nothing back unless it must, so a sample after the steps is the peak;
    where it had to, the context of the sample stands on top of the reserved peak.
    """
    reserved_bytes = cuda.memory_stats().get("reserved_bytes.all.current", 0)
    sample_bytes = _sample_process(cuda, used_before_bytes, reserved_bytes, notes)
    context_bytes = max(0, sample_bytes - reserved_bytes)
    return _Process((peaks["peak_reserved_bytes"] or reserved_bytes) + context_bytes, context_bytes)


def _sample_process(
    cuda: Cuda, used_before_bytes: int | None, reserved_bytes: int, notes: list[str]
) -> int:
    sample_bytes = nvml.best_process_bytes(
        cuda.uuid,
        os.getpid(),
        reserved_bytes=reserved_bytes,
        used_before_bytes=used_before_bytes,
        notes=notes,
    )
    if sample_bytes is not None:
        return sample_bytes
    free_bytes, total_bytes = cuda.mem_get_info()
    notes.append(
        "process_bytes: all of the device's memory in use, as cudaMemGetInfo has it; the driver's "
        "and other processes' memory is among it"
    )
    return total_bytes - free_bytes


def _parts(peaks: Peaks, context_bytes: int) -> Parts:
    allocated, reserved = peaks["peak_allocated_bytes"], peaks["peak_reserved_bytes"]
    known = allocated is not None and reserved is not None
    return Parts(
        tensors_bytes=allocated,
        allocator_bytes=reserved - allocated if known else None,  # type: ignore[operator]
        workspace_bytes=None,
        context_bytes=context_bytes,
    )


# -- the process's surroundings -----------------------------------------------------------------


def memory_fraction(capacity_bytes: int, total_bytes: int) -> float:
    """Return the fraction that the allocator turns back into exactly ``capacity_bytes``.

    The allocator keeps ``int(fraction * total)``; a quotient rounded down would cost a byte, and
    with it the last segment of a capacity in whole MiB.
    """
    fraction = capacity_bytes / total_bytes
    while int(fraction * total_bytes) < capacity_bytes:
        fraction = math.nextafter(fraction, 2.0)
    return fraction


def _cap(cuda: Cuda, capacity_bytes: int, free_bytes: int, total_bytes: int) -> None:
    if capacity_bytes > free_bytes:
        raise MembenchError(
            f"cannot cap the allocator at {format_bytes(capacity_bytes)}: this GPU has "
            f"{format_bytes(free_bytes)} free of {format_bytes(total_bytes)}; choose a smaller card"
        )
    cuda.set_memory_fraction(memory_fraction(capacity_bytes, total_bytes))


@contextmanager
def _without_collections() -> Iterator[None]:
    """Keep Python's cycle collector from freeing tensors at a moment no two runs share."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
