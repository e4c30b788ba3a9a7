"""What a process holds of a GPU outside the caching allocator, read as ever more is loaded."""

from __future__ import annotations

import os
from typing import Any

import torch

from bench import nvml
from bench.build_workload import build_workload
from bench.case import Case
from bench.cuda import Cuda

__all__ = ["read_context"]


def read_context(
    cuda: Cuda, definition: dict[str, Any], used_before_bytes: int | None
) -> dict[str, Any]:
    """Run a case's first step in a process that has done nothing yet; return three readings.

    ``bare_bytes``: the context alone; ``cudnn_bytes``: once cuDNN has run one convolution;
    ``network_bytes``: once the step has run, or has run out of memory. Also
    ``cublas_workspace_bytes``, what the first matrix product took of the allocator and kept.
    A reading that the driver does not give is None, and ``notes`` say why.
    """
    notes: list[str] = []
    cuda.mem_get_info()
    readings: dict[str, Any] = {"bare_bytes": _outside(cuda, used_before_bytes, notes)}
    image = torch.ones(1, 1, 8, 8, 8, device=cuda.device)
    torch.conv3d(image, torch.ones(1, 1, 3, 3, 3, device=cuda.device))
    readings["cudnn_bytes"] = _outside(cuda, used_before_bytes, notes)
    readings["cublas_workspace_bytes"] = _cublas_workspace(cuda)
    case = Case.from_definition(definition)
    try:
        workload = build_workload(case, _not_marked, cuda.device)
        workload.step(_not_marked)
    except torch.OutOfMemoryError:
        notes.append(f"{case.name} ran out of memory: not all of its kernels are loaded")
    cuda.synchronize()
    readings["network_bytes"] = _outside(cuda, used_before_bytes, notes)
    return {**readings, "notes": list(dict.fromkeys(notes))}


def _outside(cuda: Cuda, used_before_bytes: int | None, notes: list[str]) -> int | None:
    """Return the process's memory, as the driver has it, less what the allocator reserves."""
    cuda.synchronize()
    reserved_bytes = cuda.memory_stats().get("reserved_bytes.all.current", 0)
    used_bytes = nvml.best_process_bytes(
        cuda.uuid,
        os.getpid(),
        reserved_bytes=reserved_bytes,
        used_before_bytes=used_before_bytes,
        notes=notes,
    )
    return None if used_bytes is None else used_bytes - reserved_bytes


def _cublas_workspace(cuda: Cuda) -> int:
    a = torch.ones(64, 64, device=cuda.device)
    before = cuda.memory_stats()["requested_bytes.all.current"]
    product = a @ a
    kept: int = cuda.memory_stats()["requested_bytes.all.current"] - before
    return kept - product.nbytes


def _not_marked(_phase: str) -> None:
    pass
