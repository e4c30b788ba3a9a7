"""From a case to its predicted readings: trace, fill in the card, simulate at its capacity."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from bench.case import Case
from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import SimulationResult, needs_bytes, simulate
from bench.predict.cards import Card
from bench.predict.tracer import Trace, Tracer
from bench.predict.workspaces import fill_workspaces, uncalibrated_parts
from bench.record import Holder, Parts, Peaks
from bench.units import format_bytes

__all__ = ["peak_holders", "predict", "trace_case"]

_DEVICES = {"cuda": "cuda:0", "cpu": "cpu"}  # fake tensors know no "cuda" without an index
_SMALL_HOLDER_BYTES = 2**20  # holders below are added up by category


def trace_case(case: Case, device_type: str) -> tuple[Trace, int]:
    """Run the case's steps on fake tensors; return the trace and the parameter count.

    Raises TraceError when the step does what fake tensors cannot follow.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.workload import build_workload

    with FakeTensorMode():
        tracer = Tracer(device_type)
        with tracer.attributing(), tracer:
            workload = build_workload(case, tracer.phase, _DEVICES[device_type])
            tracer.name_modules(workload.model)
            model = workload.model
            tracer.categorise((t for t in (*model.parameters(), *model.buffers())), "parameter")
            tracer.categorise(
                (t for t in (workload.images, workload.target) if t is not None), "input"
            )
            for _ in range(case.steps):
                begun = len(tracer.trace.sites)

                def mark(phase: str, begun: int = begun) -> None:
                    if phase == "backward":
                        tracer.categorise_live_temporaries("activation", since=begun)
                    elif phase == "optimizer":
                        gradients = (p.grad for p in model.parameters() if p.grad is not None)
                        tracer.categorise(gradients, "gradient")
                    tracer.phase(phase)

                workload.step(mark)
                if workload.optimizer is not None:
                    state = _tensors(workload.optimizer.state_dict()["state"])
                    tracer.categorise(iter(state), "optimizer_state")
            tracer.stop()
            parameters = workload.parameter_count()
    return tracer.trace, parameters


def predict(
    case: Case, card: Card, device_type: str, settings: AllocatorSettings
) -> dict[str, Any]:
    """Return the fields of a predicted record that the case and the card decide."""
    bare, parameters = trace_case(case, device_type)
    trace = fill_workspaces(bare, card)
    result = simulate(trace.events, card.capacity_bytes, settings)
    needed = needs_bytes(trace.events, settings)
    fits = result.oom_at_event is None
    return {
        "status": "ok" if fits else "oom",
        "reason": "" if fits else _oom_reason(needed, card),
        "parameters": parameters,
        "capacity_bytes": card.capacity_bytes,
        "needs_bytes": needed,
        "peak_requested_bytes": result.peak_requested_bytes,
        "peak_allocated_bytes": result.peak_allocated_bytes,
        "peak_active_bytes": result.peak_active_bytes,
        "peak_reserved_bytes": result.peak_reserved_bytes,
        "process_bytes": result.peak_reserved_bytes + card.context_bytes if fits else None,
        "parts": asdict(_parts(trace, result, card)),
        "uncalibrated": (
            *uncalibrated_parts(bare.events, case.cudnn_benchmark),
            *_not_as_on_cuda(case, device_type),
        ),
        "phases": {name: asdict(_peaks(peaks)) for name, peaks in result.phases.items()},
        "peak_holders": [asdict(h) for h in peak_holders(trace, result.peak_allocated_at_event)],
    }


def _not_as_on_cuda(case: Case, device_type: str) -> tuple[str, ...]:
    """Name what the CPU's operators cannot tell of CUDA's."""
    if device_type == "cpu" and case.precision != "fp32":
        return ("mixed precision (traced as the CPU runs it)",)
    return ()


def _oom_reason(needed: int, card: Card) -> str:
    return (
        f"needs {format_bytes(needed)} of the caching allocator, "
        f"{card.name} has {format_bytes(card.capacity_bytes)}"
    )


def _peaks(result: Any) -> Peaks:
    return Peaks(
        peak_requested_bytes=result.peak_requested_bytes,
        peak_allocated_bytes=result.peak_allocated_bytes,
        peak_active_bytes=result.peak_active_bytes,
        peak_reserved_bytes=result.peak_reserved_bytes,
    )


def _parts(trace: Trace, result: SimulationResult, card: Card) -> Parts:
    workspace = sum(
        size
        for identity, size in _live_at(trace, result.peak_allocated_at_event).items()
        if trace.categories[identity] == "workspace"
    )
    return Parts(
        tensors_bytes=result.peak_allocated_bytes - workspace,
        allocator_bytes=result.peak_reserved_bytes - result.peak_allocated_bytes,
        workspace_bytes=workspace,
        context_bytes=card.context_bytes,
    )


def _live_at(trace: Trace, event_index: int) -> dict[int, int]:
    """Return id -> requested bytes of what is alive once event ``event_index`` has run."""
    live: dict[int, int] = {}
    for event in trace.events[: event_index + 1]:
        if event[0] == "alloc":
            live[event[1]] = event[2]
        elif event[0] == "free":
            live.pop(event[1], None)
    return live


def peak_holders(trace: Trace, event_index: int) -> list[Holder]:
    """Return who holds the requested bytes at the peak, largest first."""
    totals: dict[tuple[Any, ...], int] = defaultdict(int)
    for identity, size in _live_at(trace, event_index).items():
        site, category = trace.sites[identity], trace.categories[identity]
        totals[(site.module, site.operator, site.source_line, category)] += size
    holders: list[Holder] = []
    small: dict[Any, int] = defaultdict(int)
    for (module, operator, line, category), size in totals.items():
        if size >= _SMALL_HOLDER_BYTES:
            holders.append(
                Holder(
                    module=module,
                    operator=operator,
                    source_line=line,
                    category=category,
                    bytes=size,
                )
            )
        else:
            small[category] += size
    holders += [
        Holder(module="", operator="(below 1 MiB each)", source_line="", category=c, bytes=size)
        for c, size in small.items()
    ]
    return sorted(holders, key=lambda holder: -holder.bytes)


def _tensors(state: Any) -> list[Any]:
    import torch

    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [t for value in state.values() for t in _tensors(value)]
    return []
