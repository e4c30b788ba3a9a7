"""From a case to its predicted readings: trace, fill in the card, simulate at its capacity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from dataclasses import asdict, replace
from typing import Any

from bench.case import Case
from bench.errors import MembenchError
from bench.predict.alloc_conf import AllocatorSettings
from bench.predict.allocator import SimulationResult, needs_bytes, simulate
from bench.predict.calibration import Calibration, read_calibration
from bench.predict.cards import Card
from bench.predict.cuda_answers import answer_as
from bench.predict.folding import NOT_FOLDED, fold_trace, run_lengths
from bench.predict.folding_cases import repeated_steps, with_steps
from bench.predict.owners import categorise_gradients, categorise_parameters, categorise_state
from bench.predict.remedies import with_remedies
from bench.predict.step_trace import Trace, releases_in_order
from bench.predict.timeline import History, make_timeline
from bench.predict.trace_data import encode_trace
from bench.predict.traced_card import trace_for
from bench.predict.traced_streams import TracedStreams, peak_host_bytes
from bench.predict.tracer import Tracer
from bench.predict.workspaces import fill_workspaces, uncalibrated_parts
from bench.record import SMALL_HOLDERS, Category, Holder, Parts, Peaks
from bench.units import format_bytes
from memsave.errors import MemsaveError
from memsave.streams import use_streams

__all__ = ["peak_holders", "predict", "trace_case", "trace_case_folded"]

_DEVICES = {"cuda": "cuda:0", "cpu": "cpu"}  # fake tensors know no "cuda" without an index
# Smaller holders are added up by category. What a step keeps or makes is named from a few KiB on;
# weights, their gradients and the optimizer's state would be hundreds of those in every record.
_NAMED_BYTES = 2**12
_NAMED_OF_PARAMETERS_BYTES = 2**20
_NAMED_OF_PARAMETERS_SHARE = 1000  # of what tensors hold: a small network's are named too
_OF_PARAMETERS = ("parameter", "gradient", "optimizer_state")


def trace_case(case: Case, device_type: str, watched: Container[str] = ()) -> tuple[Trace, int]:
    """Run the case's steps on fake tensors; return the trace and the parameter count.

    ``watched``: the operators whose every call becomes an event, see ``Tracer``.
    Raises TraceError when the step does what fake tensors cannot follow.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bench.build_workload import build_workload

    # Real tensors are those of the user's modules, which were there before the case.
    with with_remedies(), FakeTensorMode(allow_non_fake_inputs=True):
        tracer = Tracer(device_type, watched)
        with tracer.attributing(), tracer, use_streams(TracedStreams(tracer)):
            workload = build_workload(case, tracer.phase, _DEVICES[device_type])
            tracer.trace.notes = workload.notes
            tracer.name_modules(workload.model)
            model = workload.model
            categorise_parameters(tracer, model)
            tracer.categorise(iter(workload.batch()), "input")
            for _ in range(case.steps):
                begun = len(tracer.trace.sites)

                def mark(phase: str, begun: int = begun) -> None:
                    if phase == "backward":
                        tracer.categorise_live_temporaries("activation", since=begun)
                    elif phase == "optimizer":
                        categorise_gradients(tracer, model)
                    tracer.phase(phase)

                tracer.flops.start()
                workload.step(mark)
                if workload.optimizer is not None:
                    categorise_state(tracer, model, workload.optimizer)
            tracer.stop()
            tracer.trace.flops = tracer.flops.counted
            tracer.trace.events = releases_in_order(tracer.trace.events)
            parameters = workload.parameter_count()
    return tracer.trace, parameters


def trace_case_folded(
    case: Case, device_type: str, watched: Container[str] = ()
) -> tuple[Trace, int, tuple[str, ...]]:
    """Return what ``trace_case`` returns, and notes for the record.

    The equal steps of a long recurrent network are traced a few times only, where the trace of
    the others is found to follow from theirs; the notes say how it was come by.
    """
    repeated = repeated_steps(case)
    if repeated is None or not run_lengths(*repeated):
        return *trace_case(case, device_type, watched), ()
    counts: list[int] = []

    def trace_of(steps: int) -> Trace:
        trace, parameters = trace_case(with_steps(case, steps), device_type, watched)
        counts.append(parameters)
        return trace

    try:
        folded = fold_trace(trace_of, *repeated)
    except (MembenchError, MemsaveError):
        # The whole case's own error names its own shape.
        return *trace_case(case, device_type, watched), ()
    if folded is None or len(set(counts)) > 1:
        return *trace_case(case, device_type, watched), (NOT_FOLDED,)
    return folded.trace, counts[0], (folded.note,)


def predict(
    case: Case,
    card: Card,
    device_type: str,
    settings: AllocatorSettings,
    *,
    with_trace: bool = False,
) -> dict[str, Any]:
    """Return the fields of a predicted record that the case and the card decide.

    ``with_trace`` adds ``"trace"``, what ``encode_trace`` makes of the trace without the card.
    """
    calibration = read_calibration(card.calibration, card.name)
    trace_for(card)
    answer_as(card)
    watched = calibration.watched if calibration else frozenset()
    bare, parameters, notes = trace_case_folded(case, device_type, watched)
    if calibration is not None:
        card = _with_context(card, case, calibration)
        notes = (*notes, *_other_versions(card, calibration))
    trace = fill_workspaces(bare, card, case.cudnn_benchmark)
    history: History = []
    result = simulate(trace.events, card.capacity_bytes, settings, history)
    least = trace
    if calibration is not None:  # what cuDNN tries out, for speed, takes no more than there is
        least = fill_workspaces(bare, card, case.cudnn_benchmark, trials=False)
    needed = needs_bytes(least.events, settings)
    fits = result.oom_at_event is None
    timeline = make_timeline(trace, history, result.oom_at_event)
    return {
        "status": "ok" if fits else "oom",
        "reason": "" if fits else _oom_reason(needed, card),
        "parameters": parameters,
        "forward_flops": bare.flops.forward,
        "step_flops": bare.flops.total,
        "recomputation_factor": bare.flops.recomputation_factor,
        "capacity_bytes": card.capacity_bytes,
        "needs_bytes": needed,
        "peak_requested_bytes": result.peak_requested_bytes,
        "peak_allocated_bytes": result.peak_allocated_bytes,
        "peak_active_bytes": result.peak_active_bytes,
        "peak_reserved_bytes": result.peak_reserved_bytes,
        "process_bytes": result.peak_reserved_bytes + card.context_bytes if fits else None,
        "peak_host_bytes": peak_host_bytes(bare.events),
        "parts": asdict(_parts(trace, result, card)),
        "uncalibrated": (
            *uncalibrated_parts(bare.events, case.cudnn_benchmark, card),
            *sorted(bare.estimated),
            *_not_as_on_cuda(case, device_type),
        ),
        "phases": {name: asdict(_peaks(peaks)) for name, peaks in result.phases.items()},
        "peak_holders": [asdict(h) for h in peak_holders(trace, result.peak_allocated_at_event)],
        "timeline": None if timeline is None else asdict(timeline),
        "notes": (*bare.notes, *notes),
        **({"trace": encode_trace(bare)} if with_trace else {}),
    }


def _with_context(card: Card, case: Case, calibration: Calibration) -> Card:
    """Give the card the context that was measured with this network's kernels loaded."""
    measured = calibration.context_bytes.get(f"{case.network}/{case.precision}")
    return card if measured is None else replace(card, context_bytes=measured)


def _other_versions(card: Card, calibration: Calibration) -> tuple[str, ...]:
    import torch

    others = calibration.versions.differences(torch.__version__, None, None)
    return tuple(f"the calibration of {card.name} was measured with {one}" for one in others)


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
    totals: dict[tuple[str, str, str, Category], int] = defaultdict(int)
    for identity, size in _live_at(trace, event_index).items():
        site, category = trace.sites[identity], trace.categories[identity]
        totals[(site.module, site.operator, site.source_line, category)] += size
    tensors = sum(size for key, size in totals.items() if key[3] != "workspace")
    share = min(_NAMED_OF_PARAMETERS_BYTES, tensors // _NAMED_OF_PARAMETERS_SHARE)
    held: dict[tuple[str, str, str, Category], int] = defaultdict(int)
    for key, size in totals.items():
        category = key[3]
        small = size < (share if category in _OF_PARAMETERS else _NAMED_BYTES)
        held[("", SMALL_HOLDERS, "", category) if small else key] += size
    holders = [
        Holder(module=module, operator=operator, source_line=line, category=category, bytes=size)
        for (module, operator, line, category), size in held.items()
    ]
    return sorted(holders, key=lambda holder: -holder.bytes)
