"""The process in which one case is measured: ``python -m bench.measure_worker``.

A fresh one for each case: a clean caching allocator, no context but its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from bench import nvml
from bench.errors import MembenchError
from bench.neighbours import Occupants, look
from bench.serve import serve

__all__ = ["main"]

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def main() -> None:
    """Say which GPU this is and what runs on it, then serve cases."""
    # Before CUDA is touched: afterwards the device's memory in use holds our own context.
    before = {nvml.bare_uuid(uuid): look(uuid) for uuid in nvml.uuids()}
    hello, handle = _prepare(before)
    serve(hello, handle)


def _prepare(before: dict[str, Occupants]) -> tuple[dict[str, Any], Handler]:
    """Return the hello and the handler; without a GPU, both say that there is none.

    The hello's keys are the fields of ``bench.record.Environment``, and ``memory_bytes``,
    ``compute_capability``, ``occupants`` (who was on the GPU before us), ``gpus`` (all that
    torch sees) and ``error``.
    """
    import torch

    from bench.cuda import TorchCuda

    hello: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
    try:
        cuda = TorchCuda()
    except MembenchError as error:
        return {**hello, "error": str(error)}, _refuse(str(error))
    occupants = before.get(nvml.bare_uuid(cuda.uuid)) or _unknown(cuda.uuid)
    cudnn_backend: Any = torch.backends.cudnn  # without types in torch 2.13
    cudnn = cudnn_backend.version()
    hello |= {
        "cudnn": None if cudnn is None else str(cudnn),
        "driver": nvml.driver_version(),
        "gpu": cuda.name,
        "gpu_uuid": cuda.uuid,
        "memory_bytes": cuda.total_bytes,
        "compute_capability": cuda.compute_capability,
        "occupants": occupants.to_dict(),
        "gpus": cuda.visible(),
    }

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        from bench.case import Case
        from bench.measure import measure

        with _history(request.get("snapshot")) as history:
            readings = measure(
                Case.from_definition(request["case"]),
                cuda,
                used_before_bytes=occupants.used_bytes,
                capacity_bytes=request.get("capacity_bytes"),
            )
        return {**readings, **history}

    return hello, handle


def _unknown(uuid: str) -> Occupants:
    """Say why NVML has no figure of before; one of now would hold our own context."""
    notes = look(uuid).notes or (f"NVML did not list GPU {uuid} before CUDA was touched",)
    return Occupants(processes=None, used_bytes=None, notes=notes)


def _history(path: str | None) -> AbstractContextManager[dict[str, int]]:
    """Return what records every allocation to ``path``, or does nothing without one."""
    if path is None:
        return nullcontext({})
    from bench.export.measured import recording_history

    return recording_history(Path(path))


def _refuse(why: str) -> Handler:
    def handle(_request: dict[str, Any]) -> dict[str, Any]:
        raise MembenchError(why)

    return handle


if __name__ == "__main__":
    main()
