"""Which GPU a measurement would run on, found without a CUDA context in this process.

A short-lived child answers: only torch knows which GPU it calls ``cuda:0`` (CUDA_VISIBLE_DEVICES,
CUDA's own order, a MIG slice), and a context made here would take memory from every case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.child import Child
from bench.errors import MembenchError
from bench.neighbours import Occupants

__all__ = ["GpuIdentity", "gpu_identity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuIdentity:
    """A GPU as torch sees it, and the name of its card, under which its records go."""

    name: str  # "NVIDIA H200"
    uuid: str  # "GPU-..."
    memory_bytes: int  # as CUDA reports it
    card: str  # "h200-141gb"
    occupants: Occupants | None = None  # who was on it before we came
    alike: tuple[str, ...] = ()  # UUIDs of the other visible GPUs of its model and memory
    unlike: tuple[str, ...] = ()  # names of the visible GPUs of another


def gpu_identity() -> GpuIdentity:
    """Return the GPU that ``--device cuda`` measures on.

    Raises MembenchError where there is none, saying why.
    """
    from bench.predict.cards import card_name_for_gpu

    child = Child("bench.measure_worker")
    try:
        hello = child.hello
    finally:
        child.close()
    if hello["gpu"] is None:
        raise MembenchError(hello["error"])
    occupants = hello.get("occupants")
    others = hello.get("gpus", [])[1:]
    alike = [gpu for gpu in others if _same_model(gpu, hello)]
    return GpuIdentity(
        name=hello["gpu"],
        uuid=hello["gpu_uuid"],
        memory_bytes=hello["memory_bytes"],
        card=card_name_for_gpu(hello["gpu"], hello["memory_bytes"]),
        occupants=None if occupants is None else Occupants.from_dict(occupants),
        alike=tuple(gpu["uuid"] for gpu in alike),
        unlike=tuple(gpu["name"] for gpu in others if gpu not in alike),
    )


def _same_model(gpu: dict[str, Any], first: dict[str, Any]) -> bool:
    return (gpu["name"], gpu["memory_bytes"]) == (first["gpu"], first["memory_bytes"])
