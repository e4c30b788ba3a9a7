"""The two ways a case can be run: predicted for a card, or measured on the GPU that is here."""

from __future__ import annotations

from typing import Literal

from bench.environment import allocator_settings
from bench.errors import MembenchError
from bench.predict.alloc_conf import parse_alloc_conf
from bench.predict.cards import Card
from bench.predict.shim import choose_tracer, gpu_visible
from bench.runner import Backend, usable_cores

__all__ = ["Device", "measured_backend", "predicted_backend", "use_cuda"]

Device = Literal["auto", "cuda", "predict"]

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


def measured_backend(emulated: Card | None = None) -> Backend:
    """Return how to measure on the GPU that is here, one fresh process a case.

    With ``emulated``, the allocator may use no more than that card offers; the records stay
    measured, under the real GPU's name, and say in ``capped_to`` which card it was.
    """
    from bench.gpu import gpu_identity

    return Backend(
        evidence="measured",
        module="bench.measure_worker",
        card=gpu_identity().card,
        workers=1,
        reuse=False,
        request={"capacity_bytes": emulated.capacity_bytes} if emulated else {},
        capped_to=emulated.name if emulated else None,
    )
