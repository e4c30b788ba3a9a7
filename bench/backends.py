"""The two ways a case can be run: predicted for a card, or measured on the GPU that is here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from bench.environment import allocator_settings
from bench.errors import MembenchError
from bench.predict.alloc_conf import parse_alloc_conf
from bench.predict.cards import Card
from bench.predict.shim import choose_tracer, gpu_visible
from bench.runner import Backend, usable_cores
from bench.units import format_bytes

if TYPE_CHECKING:
    from bench.gpu import GpuIdentity

__all__ = ["Device", "measured_backend", "predicted_backend", "use_cuda"]

Device = Literal["auto", "cuda", "predict"]

_SEVERAL = "step_times_s: {} GPUs of the machine ran cases at the same time"
_WORKERS_LIMIT = 8  # a worker holds torch: about 400 MiB


def use_cuda(device: Device) -> bool:
    """Whether to measure: ``auto`` measures where there is a GPU.

    Raises MembenchError when ``cuda`` is asked for and there is none.
    """
    if device == "predict":
        return False
    visible, why = gpu_visible()
    if device == "cuda" and not visible:
        raise MembenchError(f"--device cuda: {why}; use --device predict to predict without a GPU")
    return visible


def predicted_backend(card: Card) -> tuple[Backend, str]:
    """Return how to predict for ``card``, and why the tracer is the one it is.

    Compiles the tracer's library once, here, so that the workers do not race to do it.
    Raises MembenchError for allocator settings that torch would refuse.
    """
    settings = allocator_settings()
    parse_alloc_conf(settings)  # refused here, once, rather than by every case
    tracer, why = choose_tracer()
    backend = Backend(
        evidence="predicted",
        module="bench.predict.worker",
        card=card.name,
        workers=min(usable_cores(), _WORKERS_LIMIT),
        reuse=True,
        child_environment={"MEMBENCH_WORKER_TRACER": tracer, "OMP_NUM_THREADS": "1"},
        request={"card": card.to_dict(), "allocator_settings": settings},
        tracer=tracer,
    )
    return backend, why


def measured_backend(emulated: Card | None = None, *, exclusive: bool = False) -> Backend:
    """Return how to measure on the GPU that is here, one fresh process a case.

    Where several are visible, all of the first one's model measure cases at once, each a case at a
    time; those of another model are left out, for their records would be another card's.

    With ``emulated``, the allocator may use no more than that card offers: its memory less its
    context, in bytes. The records stay measured, under the real GPU's name, and say in
    ``capped_to`` which card it was. To name the GPU's own card caps nothing. With ``exclusive``,
    no other process may be on the GPU, neither now nor while a case runs.

    Raises MembenchError when the card is larger than the GPU, and when ``exclusive`` is not so, or
    NVML cannot tell.
    """
    from bench.gpu import gpu_identity

    gpu = gpu_identity()
    capped = emulated if emulated is not None and emulated.name != gpu.card else None
    if capped is not None and capped.capacity_bytes > gpu.memory_bytes:
        raise MembenchError(
            f"--card {capped.name}: it offers {format_bytes(capped.capacity_bytes)}, and this GPU "
            f"({gpu.name}) has {format_bytes(gpu.memory_bytes)}; choose a smaller card, or predict "
            "for it with --device predict"
        )
    return Backend(
        evidence="measured",
        module="bench.measure_worker",
        card=gpu.card,
        workers=1 + len(gpu.alike),
        reuse=False,
        # A single GPU is left to CUDA_VISIBLE_DEVICES as it is.
        worker_environments=tuple(
            {"CUDA_VISIBLE_DEVICES": uuid} for uuid in ((gpu.uuid, *gpu.alike) if gpu.alike else ())
        ),
        notes=(_SEVERAL.format(1 + len(gpu.alike)),) if gpu.alike else (),
        request={"capacity_bytes": capped.capacity_bytes} if capped else {},
        capped_to=capped.name if capped else None,
        exclusive=exclusive,
        warning="; ".join(filter(None, (*_all_shared(gpu, exclusive), _left_out(gpu)))),
    )


def _all_shared(gpu: GpuIdentity, exclusive: bool) -> list[str]:
    from bench.neighbours import look

    gpus = [gpu, *(replace(gpu, uuid=uuid, occupants=look(uuid)) for uuid in gpu.alike)]
    return [_shared(one, exclusive) for one in gpus]


def _left_out(gpu: GpuIdentity) -> str:
    if not gpu.unlike:
        return ""
    return f"measuring on {gpu.name} alone, GPUs of other models are left out: " + ", ".join(
        gpu.unlike
    )


def _shared(gpu: GpuIdentity, exclusive: bool) -> str:
    """Return a warning when others are on the GPU, or raise when they must not be."""
    occupants = gpu.occupants
    if occupants is None or not occupants.known:
        why = "; ".join(occupants.notes if occupants else ()) or "NVML says nothing"
        if exclusive:
            raise MembenchError(
                f"--exclusive: cannot tell who else is on {gpu.name} ({why}); "
                "pip install nvidia-ml-py, or run without --exclusive"
            )
        return f"cannot tell who else is on {gpu.name}: {why}"
    others = occupants.describe()
    if others and exclusive:
        raise MembenchError(
            f"--exclusive: {gpu.name} ({gpu.uuid}) is not ours alone: {others}; end them, choose "
            "another GPU with CUDA_VISIBLE_DEVICES, or run without --exclusive"
        )
    return f"{gpu.name} is not ours alone: {others}" if others else ""
