"""Records made up for tests, with round numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

from bench.case import Case, PaperFigure
from bench.record import Environment, Parts, Record

__all__ = ["GIB", "make_case", "make_record", "make_table1"]

GIB = 2**30


_OF_CASE = (
    *("network", "variant", "requested_shape", "shape", "mode", "batch_size", "precision"),
    *("paper", "position", "volumes", "baseline"),
)


def make_case(**overrides: Any) -> Case:
    """Return a case: the FCN's baseline at 96x96x96, with any field replaced."""
    values: dict[str, Any] = {
        "network": "fcn",
        "variant": "baseline",
        "requested_shape": (96, 96, 96),
    }
    values.update(overrides)
    values.setdefault("shape", values["requested_shape"])
    return Case(**values)


def make_record(**overrides: Any) -> Record:
    """Return a predicted record with any field replaced.

    As it comes: 3 GiB reserved and 0.5 GiB of context on a card that offers the allocator 31 GiB.
    ``environment`` and ``parts`` take a dict of their fields to replace; ``paper`` is a
    PaperFigure; ``position`` the case's place in its suite. ``needs_bytes`` is the allocator's.
    """
    case = make_case(**{name: overrides.pop(name) for name in _OF_CASE if name in overrides})
    environment = {
        "membench": "0.1.0",
        "torch": "2.13.0",
        "suite": "table1",
        "suite_hash": "0123456789abcdef",
        "commit": "1234567890abcdef1234567890abcdef12345678",
        "dirty": False,
        "python": "3.11.4",
        "platform": "Linux-x86_64",
        "started_at": "2025-11-21T10:00:00+00:00",
    } | overrides.pop("environment", {})
    status = overrides.get("status", "ok")
    values: dict[str, Any] = {
        "techniques": (),
        "exact": True,
        "status": "ok",
        "reason": "" if status == "ok" else f"made {status} for a test",
        "evidence": "predicted",
        "tracer": "cuda-shim",
        "card": "v100-32gb",
        "parameters": 9_522_787,
        "capacity_bytes": 31 * GIB,
        "needs_bytes": 3 * GIB - GIB // 4,
        "peak_requested_bytes": 2 * GIB,
        "peak_allocated_bytes": 2 * GIB + GIB // 2,
        "peak_active_bytes": 2 * GIB + GIB // 2,
        "peak_reserved_bytes": 3 * GIB,
        "process_bytes": 3 * GIB + GIB // 2 if status == "ok" else None,
    } | overrides
    parts = {
        "tensors_bytes": 2 * GIB,
        "workspace_bytes": GIB // 2,
        "allocator_bytes": GIB // 2,
        "context_bytes": GIB // 2,
    } | values.pop("parts", {})
    return Record(
        case=case.name,
        network=case.network,
        variant=case.variant,
        precision=case.precision,
        shape=case.shape,
        requested_shape=case.requested_shape,
        mode=case.mode,
        batch_size=case.batch_size,
        volumes=case.volumes,
        definition=case.to_definition(),
        environment=Environment(**environment),
        parts=Parts(**parts),
        **values,
    )


_PAPER_GB = {  # Table 1 of the paper: variant -> parameters, GB at the three shapes
    "baseline": (9_522_787, 3.7, 28.4, 32.0),
    "bottleneck": (3_216_915, 3.1, 28.3, 32.0),
    "sepconv": (2_784_542, 3.2, 30.1, 32.0),
    "ccblock": (2_635_395, 3.0, 27.2, 32.0),
    "ccblock+inplace_abn": (2_635_395, 2.3, 20.0, 30.2),
    "ccblock+inplace_abn+mp": (2_635_395, 1.6, 11.7, 17.6),
}
_RESERVED_GIB = {  # made up, near what the step needs
    (96, 96, 96): (2.9, 2.8, 3.0, 2.7, 1.9, 1.1),
    (256, 256, 152): (26.1, 26.0, 28.2, 25.3, 16.7, 9.1),
    (256, 256, 234): (41.2, 41.1, 44.4, 39.9, 26.3, 14.3),
}


def make_table1(**overrides: Any) -> list[Record]:
    """Return the 18 cells of the FCN paper's Table 1, with made-up figures near the real ones."""
    context = overrides.pop("context_bytes", GIB // 2)
    records: list[Record] = []
    for column, (shape, reserved_gib) in enumerate(_RESERVED_GIB.items()):
        for place, (variant, (parameters, *printed)) in enumerate(_PAPER_GB.items()):
            reserved = int(reserved_gib[place] * GIB)
            fits = reserved <= 31 * GIB
            relation = "=" if column < 2 else ">" if place < 4 else "~"
            sign = "" if relation == "=" else f"{relation} "
            figure = "32" if relation == ">" else f"{printed[column]}"
            tensors = reserved - reserved // 8
            records.append(
                make_record(
                    variant=variant,
                    precision="fp16" if variant.endswith("mp") else "fp32",
                    requested_shape=shape,
                    shape=(*shape[:2], -(-shape[2] // 8) * 8),
                    position=len(records),
                    paper=PaperFigure(
                        text=f"{sign}{figure} GB",
                        relation=relation,  # type: ignore[arg-type]
                        bytes=round(printed[column] * 1e9),
                    ),
                    parameters=parameters,
                    status="ok" if fits else "oom",
                    needs_bytes=reserved,
                    peak_requested_bytes=tensors - 2**20,
                    peak_allocated_bytes=tensors,
                    peak_active_bytes=tensors,
                    peak_reserved_bytes=reserved if fits else 31 * GIB,
                    process_bytes=reserved + context if fits else None,
                    parts={
                        "tensors_bytes": tensors - GIB // 8,
                        "workspace_bytes": GIB // 8,
                        "allocator_bytes": reserved - tensors,
                        "context_bytes": context,
                    },
                    **{"uncalibrated": ("cudnn_workspace",), **overrides},
                )
            )
    return records
