"""The tracer on the CPU against what torch's own CPU allocator did in the very same steps.

The judge is the profiler: it hears of every allocation and release from the allocator, by address,
in steps that run on real numbers. Nothing in it is the tracer's: bytes and lifetimes are facts.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch.autograd.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from bench.build_workload import build_workload
from bench.case import Case, TechniqueUse
from bench.predict.engine_adds import EngineAdds
from bench.predict.predictor import trace_case
from bench.predict.step_trace import Event

CHECKPOINT = (TechniqueUse(name="checkpoint"),)
# What Python and torch keep on the CPU beside the tensors of a step, on every device: a number
# that meets a tensor becomes a scalar of 8 bytes, kept if backward needs it (the 2 of Dice's
# numerator), and a checkpoint keeps the state of the CPU's random numbers.
NUMBER_BYTES = 8
RANDOM_STATE_BYTES = 5056
BATCH_NORM_CHANNELS = (4 + 8) + (8 + 16) + (4 + 8)  # of the widths 8 and 16, by block


def fcn(side: int = 16, **changes: Any) -> Case:
    options = {"widths": [8, 16]} | changes.pop("network_options", {})
    shape = (side, side, side)
    return Case(
        network="fcn",
        variant="v",
        requested_shape=shape,
        shape=shape,
        network_options=options,
        **changes,
    )


def block(name: str, **changes: Any) -> Case:
    return fcn(network_options={"block": name}, **changes)


def in_place(**changes: Any) -> Case:
    return fcn(network_options={"block": "ccblock", "norm": "inplace_abn"}, **changes)


CASES = {
    "float32": fcn(32),
    "bfloat16": fcn(precision="bf16"),
    "float16": fcn(precision="fp16"),
    "bottleneck": block("bottleneck"),
    "sepconv": block("sepconv"),
    "ccblock": block("ccblock"),
    "in-place ABN": in_place(side=32),
    "in-place ABN, bfloat16": in_place(precision="bf16"),
    "checkpoint": fcn(techniques=CHECKPOINT),
    "checkpoint, in-place ABN, float16": in_place(precision="fp16", techniques=CHECKPOINT),
    "two images": fcn(batch_size=2),
    "infer": fcn(mode="infer"),
    "infer, bfloat16": fcn(mode="infer", precision="bf16"),
    "SGD with momentum": fcn(optimizer="sgd", optimizer_options={"momentum": 0.9}),
    "RMSprop": fcn(optimizer="rmsprop"),
    "AdamW, one tensor at a time": fcn(optimizer="adamw", optimizer_options={"foreach": False}),
    "fused Adam": fcn(optimizer_options={"fused": True}),
    "three levels": fcn(network_options={"widths": "doubling", "base_width": 4, "levels": 3}),
    "four levels of the paper": fcn(network_options={"widths": "doubling"}, steps=1),
}


@dataclass(frozen=True, slots=True)
class Happened:
    """An allocation, a release, a phase's or an operator's beginning or an operator's end."""

    kind: str  # "alloc", "free", "phase", "operator" or "end"
    storage: int = -1  # a number of its own for each allocation
    size: int = 0  # bytes
    name: str = ""


class MarkingOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tell the profiler where each operator that the tracer would see begins and ends.

    Watched, autograd adds gradients up out of place, here as under the tracer. What it does
    unwatched has a test of its own, ``test_engine_adds.py``; here the same rule is applied.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.engine_adds = EngineAdds("cpu")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = self.engine_adds.operator(func, args)
        with record_function(f"operator {func}"):
            result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.engine_adds.made(result.untyped_storage()._cdata)
        return result


@contextmanager
def no_collection() -> Iterator[None]:
    """As under the tracer: else cycles would be collected at a moment of the collector's own."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@cache
def really(name: str, mark_operators: bool) -> list[Happened]:
    """Run the case's steps on real tensors; return what the CPU's allocator did."""
    case = CASES[name]

    def mark(phase: str) -> None:
        with record_function(f"phase {phase}"):
            pass

    operators: Any = nullcontext()
    if mark_operators:
        operators = MarkingOperators()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread's temporaries have no place in the order of events
    try:
        with no_collection(), profile(profile_memory=True) as profiler, operators:
            workload = build_workload(case, mark, "cpu")
            if workload.precision.scaler is not None:
                # A prediction says that nothing overflowed; from 65536 these steps would, and
                # would skip the optimizer.
                workload.precision.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
            for _ in range(case.steps):
                workload.step(mark)
            mark("over")
    finally:
        torch.set_num_threads(threads)
    return list(_in_order(profiler.kineto_results.experimental_event_tree()))


def _in_order(roots: list[Any]) -> Iterator[Happened]:
    live: dict[int, tuple[int, int]] = {}  # address -> storage, bytes
    for storage, (_, event) in enumerate(sorted(_moments(roots), key=lambda moment: moment[0])):
        if isinstance(event, Happened):
            yield event
        elif event.alloc_size > 0:
            live[event.ptr] = (storage, event.alloc_size)
            yield Happened("alloc", storage, event.alloc_size)
        else:
            yield Happened("free", *live.pop(event.ptr))


def _moments(events: list[Any]) -> Iterator[tuple[int, Any]]:
    for event in events:
        if event.name.startswith("phase "):
            yield event.start_time_ns, Happened("phase", name=event.name[6:])
        elif event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields
        elif event.name.startswith("operator "):
            yield event.start_time_ns, Happened("operator", name=event.name[9:])
            yield event.end_time_ns, Happened("end")
        yield from _moments(event.children)


@cache
def traced(name: str) -> list[Happened]:
    trace, _ = trace_case(CASES[name], "cpu")
    sizes = {event[1]: event[2] for event in trace.events if event[0] == "alloc"}

    def happened(event: Event) -> Happened:
        if event[0] == "phase":
            return Happened("phase", name=event[1])
        return Happened(event[0], event[1], sizes[event[1]], trace.sites[event[1]].operator)

    known = ("alloc", "free", "phase")
    return [happened(e) for e in trace.events if e[0] in known] + [Happened("phase", name="over")]


def live_at_phases(events: list[Happened]) -> list[tuple[str, int]]:
    """Return the bytes alive as each phase begins, the last one being called "over"."""
    live, found = 0, []
    for event in events:
        if event.kind == "phase":
            found.append((event.name, live))
        live += {"alloc": event.size, "free": -event.size}.get(event.kind, 0)
    return found


def has_half_batch_norm(case: Case) -> bool:
    plain = case.network_options.get("norm") != "inplace_abn"
    return plain and case.precision != "fp32" and case.mode == "train"


def kept_beside(case: Case) -> int:
    """Bytes that backward keeps on the CPU and the tracer does not see, see above."""
    if case.mode == "infer":
        return 0
    blocks = 2 * len(case.network_options["widths"]) - 1 if case.techniques else 0
    # torch's rule for fake tensors gives the saved mean and 1/std of native_batch_norm the half
    # type of its input; the CPU's kernel keeps them in float32. cuDNN's rule has float32.
    statistics = 2 * 2 * BATCH_NORM_CHANNELS if has_half_batch_norm(case) else 0
    return NUMBER_BYTES + blocks * RANDOM_STATE_BYTES + statistics


@pytest.mark.parametrize("name", CASES)
def test_as_each_phase_ends_the_very_same_bytes_are_alive(name: str) -> None:
    case = CASES[name]
    real, predicted = live_at_phases(really(name, False)), live_at_phases(traced(name))
    expected = [
        (phase, live + (kept_beside(case) if phase == "backward" else 0))
        for phase, live in predicted
    ]
    assert real == expected
    assert len(real) == 1 + case.steps * (3 if case.mode == "train" else 1) + 1


Group = tuple[str, list[tuple[int, int]]]
"""A kind, and for each event its bytes and, of a release, the group that it was allocated in."""


def groups(events: list[Happened], left_out: set[int]) -> list[Group]:
    """Return the events in order, those of one kind that follow each other as one sorted group.

    Inside of a group the order says nothing: a kernel may make its two results the other way
    round than it returns them, and what dies with an operator dies in any order.
    """
    found: list[Group] = []
    born: dict[int, int] = {}
    for event in events:
        if event.kind in ("operator", "end") or event.storage in left_out:
            continue
        kind = event.kind + event.name if event.kind == "phase" else event.kind
        if not found or found[-1][0] != kind:
            found.append((kind, []))
        if event.kind == "alloc":
            born[event.storage] = len(found)
            found[-1][1].append((event.size, 0))
        elif event.kind == "free":
            found[-1][1].append((event.size, born[event.storage]))
    return [(kind, sorted(members)) for kind, members in found]


def inner_temporaries(events: list[Happened]) -> set[int]:
    """Return what was allocated and released inside of one operator: the CPU kernel's own."""
    found: set[int] = set()
    own: set[int] = set()
    inside = False
    for event in events:
        if event.kind in ("operator", "end"):
            inside, own = event.kind == "operator", set()
        elif event.kind == "alloc" and inside:
            own.add(event.storage)
        elif event.kind == "free" and event.storage in own:
            found.add(event.storage)
    return found


def made_by_no_operator(events: list[Happened]) -> set[int]:
    found: set[int] = set()
    inside = False
    for event in events:
        if event.kind in ("operator", "end"):
            inside = event.kind == "operator"
        elif event.kind == "alloc" and not inside:
            found.add(event.storage)
    return found


def numbers_made_tensors(events: list[Happened]) -> set[int]:
    """torch.tensor(0.0): allocated by no operator, first seen by the tracer when it is lifted."""
    return {e.storage for e in events if e.name.startswith("aten.lift_fresh")}


def copies_inside(events: list[Happened]) -> set[int]:
    """What the tracer knows of the insides of operators."""
    return {e.storage for e in events if e.name.endswith("(copy inside)")}


@pytest.mark.parametrize("name", [n for n in CASES if not has_half_batch_norm(CASES[n])])
def test_every_storage_is_allocated_and_released_when_it_really_is(name: str) -> None:
    """Event by event, but for what lives inside of one CPU kernel or is made by none.

    Not with half-precision batch norm, whose statistics differ, see ``kept_beside``.
    """
    real, predicted = really(name, True), traced(name)
    outside = made_by_no_operator(real)
    assert {e.size for e in real if e.storage in outside} <= {4, NUMBER_BYTES, RANDOM_STATE_BYTES}
    expected = groups(real, outside | inner_temporaries(real))
    left_out = numbers_made_tensors(predicted) | copies_inside(predicted)
    assert groups(predicted, left_out) == expected


@pytest.mark.parametrize("name", CASES)
def test_the_copies_that_reductions_make_inside_are_those_of_the_kernels(name: str) -> None:
    """Dice counts the voxels of a mask: its sum is that of a copy in int64, on CUDA too."""
    real, predicted = really(name, True), traced(name)
    inside, copies, operator = inner_temporaries(real), [], ""
    for event in real:
        operator = event.name if event.kind == "operator" else operator
        if event.kind == "alloc" and event.storage in inside and operator.startswith("aten.sum"):
            copies.append(event.size)
    traced_copies = copies_inside(predicted)
    found = [e.size for e in predicted if e.kind == "alloc" and e.storage in traced_copies]
    assert found == copies
    case = CASES[name]
    voxels = case.batch_size * case.shape[0] ** 3
    assert copies == ([] if case.mode == "infer" else case.steps * [3 * voxels * 8])
