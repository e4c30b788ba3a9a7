"""What libraries take through the allocator besides tensors, filled into a trace for one card.

cuBLAS keeps one workspace per handle and stream, of a size known exactly. cuDNN takes a workspace
for the length of a convolution; its size is not public, so a card without a calibration uses
the estimate in its file, and the record says so.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.predict.cards import Card
from bench.predict.tracer import Event, Site, Trace

__all__ = ["fill_workspaces", "uncalibrated_parts"]


def fill_workspaces(trace: Trace, card: Card) -> Trace:
    """Return the trace with every library event replaced by allocations of ``card``'s sizes."""
    filled = Trace(sites=list(trace.sites), categories=list(trace.categories))
    events = filled.events
    for event in trace.events:
        if event[0] == "convolution":
            _, operand_bytes, kind, site = event
            identity = _allocate(
                filled, card.convolution_workspace_bytes(kind, operand_bytes), site
            )
            events.append(("free", identity))
        elif event[0] == "cublas":
            _allocate(filled, card.cublas_workspace_bytes, event[2])
        else:
            events.append(event)
    return filled


def _allocate(trace: Trace, size: int, site: Site) -> int:
    identity = len(trace.sites)
    trace.events.append(("alloc", identity, size, 0))
    trace.sites.append(site)
    trace.categories.append("workspace")
    return identity


def uncalibrated_parts(events: Iterable[Event], cudnn_benchmark: bool) -> tuple[str, ...]:
    """Name the parts of a prediction that rest on an estimate, not on a measurement."""
    parts = ["context"]
    if any(event[0] == "convolution" for event in events):
        parts.append(
            "convolution workspace (cudnn.benchmark on)"
            if cudnn_benchmark
            else "convolution workspace"
        )
    return tuple(parts)
