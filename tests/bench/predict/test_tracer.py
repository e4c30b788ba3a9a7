"""The tracer on fake CPU tensors: what it records does not depend on the device's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bench.predict.step_trace import Event, Site, Trace
from bench.predict.tracer import TraceError, Tracer
from memsave.checkpoint import checkpoint_block

FLOAT = 4  # bytes


@contextmanager
def tracing() -> Iterator[Tracer]:
    with FakeTensorMode():
        tracer = Tracer("cpu")
        with tracer.attributing(), tracer:
            yield tracer


def traced(step: Callable[[Tracer], object]) -> Trace:
    with tracing() as tracer:
        step(tracer)
        tracer.stop()
    return tracer.trace


def sizes(trace: Trace) -> list[int]:
    return [event[2] for event in trace.events if event[0] == "alloc"]


def live_bytes(events: list[Event]) -> list[int]:
    """Return the bytes alive after each event."""
    known: dict[int, int] = {}
    curve = []
    for event in events:
        if event[0] == "alloc":
            known[event[1]] = event[2]
        elif event[0] == "free":
            del known[event[1]]
        curve.append(sum(known.values()))
    return curve


def test_an_operator_allocates_its_result_and_a_dead_result_is_freed() -> None:
    def step(_: Tracer) -> None:
        a = torch.ones(100)
        b = a + a
        del a
        b.mul_(2)

    events = traced(step).events
    assert events == [
        ("alloc", 0, 100 * FLOAT, 0),
        ("alloc", 1, 100 * FLOAT, 0),
        ("free", 0),
        ("free", 1),
    ]


def test_views_in_place_operators_and_empty_tensors_allocate_nothing() -> None:
    def step(_: Tracer) -> None:
        a = torch.ones(4, 25)
        b = a.view(100)[10:].detach()
        b += 1
        torch.ones(0)

    assert sizes(traced(step)) == [100 * FLOAT]


def test_a_view_keeps_its_storage_alive() -> None:
    def step(tracer: Tracer) -> None:
        a = torch.ones(100)
        view = a[:1]
        del a
        tracer.phase("forward")
        del view

    assert [event[0] for event in traced(step).events] == ["alloc", "phase", "free"]


def test_a_storage_resized_to_zero_and_back_is_freed_and_allocated_again() -> None:
    def step(_: Tracer) -> None:
        a = torch.ones(100)
        a.untyped_storage().resize_(0)
        a.untyped_storage().resize_(400)

    assert traced(step).events == [
        ("alloc", 0, 400, 0),
        ("free", 0),
        ("alloc", 1, 400, 0),
        ("free", 1),
    ]


def test_a_training_step_leaves_parameters_gradients_and_nothing_else() -> None:
    model: nn.Module

    def step(tracer: Tracer) -> None:
        nonlocal model
        model = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1))
        tracer.name_modules(model)
        model(torch.ones(1, 1, 8, 8, 8)).sum().backward()

    trace = traced(step)
    parameters = (4 * 27 + 4) + (2 * 4 + 2)
    assert live_bytes(trace.events)[-1] == 2 * parameters * FLOAT


def test_backward_allocations_carry_the_module_and_line_of_their_forward() -> None:
    def step(tracer: Tracer) -> None:
        model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 1))
        tracer.name_modules(model)
        logits = model(torch.ones(1, 1, 8, 8, 8))
        tracer.phase("backward")
        logits.sum().backward()

    sites = traced(step).sites
    backward = [s for s in sites if s.operator == "aten.convolution_backward.default"]
    forward = [s for s in sites if s.operator == "aten.convolution.default"]
    assert {s.module for s in backward} == {"0", "2"}
    assert {(s.module, s.source_line) for s in backward} == {
        (s.module, s.source_line) for s in forward
    }
    assert all(s.source_line.startswith("tests/bench/predict/test_tracer.py:") for s in forward)


def test_what_a_checkpoint_recomputes_is_attributed_to_its_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv3d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(lambda t: self.inner(t).relu(), x, use_reentrant=False)
            return result

    def step(tracer: Tracer) -> None:
        model = Net()
        tracer.name_modules(model)
        loss = model(torch.ones(1, 1, 8, 8, 8)).sum()
        tracer.phase("backward")
        loss.backward()

    trace = traced(step)
    start = trace.events.index(("phase", "backward"))
    recomputed = [trace.sites[e[1]] for e in trace.events[start:] if e[0] == "alloc"]
    convolution = next(s for s in recomputed if s.operator == "aten.convolution.default")
    assert convolution.module == "inner"


def line_of(text: str) -> str:
    """``file.py:12`` of the one line of this file that ends with the comment ``# text``."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"  # {text}"))
    return f"tests/bench/predict/test_tracer.py:{number}"


def test_a_custom_functions_backward_is_attributed_to_its_own_lines() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
            return gradient * 2  # of backward

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = Doubled.apply(x)  # type: ignore[no-untyped-call]
            return result

    def step(tracer: Tracer) -> None:
        model = nn.Sequential(Net())
        tracer.name_modules(model)
        x = torch.ones(100, requires_grad=True)
        model(x).sum().backward()

    products = [s for s in traced(step).sites if s.operator == "aten.mul.Tensor"]
    assert [s.module for s in products] == ["0", "0"]
    assert products[1].source_line == line_of("of backward")


def test_a_recomputed_module_keeps_the_line_that_called_it_in_forward() -> None:
    """And not that of whoever asked for the tensor: here a Function's own backward."""

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            result: Tensor = gradient + x
            return result

    class Keeping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = Kept.apply(x)  # type: ignore[no-untyped-call]
            return result

    def step(tracer: Tracer) -> None:
        model = nn.Sequential(checkpoint_block(nn.Sequential(nn.Conv3d(1, 4, 3), Keeping())))
        tracer.name_modules(model)
        loss = model(torch.ones(1, 1, 8, 8, 8)).sum()  # the call
        tracer.phase("backward")
        loss.backward()

    sites = [s for s in traced(step).sites if s.operator == "aten.convolution.default"]
    assert len(sites) == 2
    assert set(sites) == {Site("0.0", "aten.convolution.default", line_of("the call"))}


def test_a_value_read_in_the_step_is_an_error_that_names_its_line() -> None:
    def step(_: Tracer) -> None:
        torch.ones(3).sum().item()

    with pytest.raises(TraceError, match=r"tests/bench/predict/test_tracer\.py:\d+: .*\.item\(\)"):
        traced(step)


def test_a_size_that_depends_on_values_is_an_error_too() -> None:
    def step(_: Tracer) -> None:
        torch.ones(3).nonzero()

    with pytest.raises(TraceError, match="nonzero"):
        traced(step)


def test_the_one_read_of_grad_scaler_is_answered_with_no_infinities() -> None:
    steps = []

    class Counting(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            steps.append(1)
            super().step(closure)

    def step(_: Tracer) -> None:
        weight = nn.Parameter(torch.ones(100))
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((weight * 2).sum()).backward()  # type: ignore[no-untyped-call]
        scaler.step(Counting([weight], lr=0.1, foreach=True))
        scaler.update()

    traced(step)
    assert steps == [1]


def test_a_read_inside_the_optimizer_that_grad_scaler_calls_is_still_an_error() -> None:
    class Reading(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
            self.param_groups[0]["params"][0].sum().item()

    def step(_: Tracer) -> None:
        weight = nn.Parameter(torch.ones(100))
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((weight * 2).sum()).backward()  # type: ignore[no-untyped-call]
        scaler.step(Reading([weight], lr=0.1))

    with pytest.raises(TraceError, match=r"\.item\(\)"):
        traced(step)


def test_convolutions_name_their_activation_operands_for_the_workspace() -> None:
    def step(_: Tracer) -> None:
        convolution = nn.Conv3d(2, 4, 1, bias=False)
        image = torch.ones(1, 2, 8, 8, 8, requires_grad=True)
        convolution(image).sum().backward()

    source, result = 2 * 512 * FLOAT, 4 * 512 * FLOAT
    events = [e for e in traced(step).events if e[0] == "convolution"]
    assert [(e[1], e[2]) for e in events] == [
        (source + result, "float32"),  # forward
        (result + source, "float32"),  # the input's gradient
        (result + source, "float32"),  # the weight's gradient
    ]


def test_a_gradient_that_is_no_dense_tensor_is_copied_for_the_length_of_the_call() -> None:
    """sum's gradient is one expanded number: 0 bytes as a view, the whole activation as a copy.

    The copy is there while both gradients and their workspaces are; then the bias is summed.
    """

    def step(tracer: Tracer) -> None:
        image = torch.ones(1, 1, 8, 8, 8, requires_grad=True)
        loss = nn.Conv3d(1, 4, 1)(image).sum()
        tracer.phase("backward")
        loss.backward()

    events = traced(step).events
    backward = events[events.index(("phase", "backward")) :]
    sizes_of = [e[2] if e[0] == "alloc" else e[0] for e in backward]
    assert sizes_of[2:9] == [
        *(4 * 512 * FLOAT, 512 * FLOAT, "convolution"),  # the copy, the input's gradient
        *(4 * FLOAT, "convolution", "free"),  # the weight's gradient, the copy's end
        4 * FLOAT,  # the bias's gradient
    ]
    copy = backward[2][1]
    assert next(e for e in backward if e[0] == "free") == ("free", copy)


def test_a_convolution_reads_its_operands_in_one_layout() -> None:
    """A weight in channels last takes the image with it, which is copied for the call."""

    def step(tracer: Tracer) -> None:
        weight = torch.ones(4, 2, 3, 3, 3).to(memory_format=torch.channels_last_3d)
        image = torch.ones(1, 2, 8, 8, 8)
        tracer.phase("forward")
        F.conv3d(image, weight, padding=1)
        tracer.phase("over")
        F.conv3d(image.to(memory_format=torch.channels_last_3d), weight, padding=1)

    trace = traced(step)
    start, end = (trace.events.index(("phase", name)) for name in ("forward", "over"))
    inside = [e for e in trace.events[start:end] if e[0] == "alloc"]
    assert [e[2] for e in inside] == [2 * 512 * FLOAT, 4 * 512 * FLOAT]
    assert trace.sites[inside[0][1]].operator.endswith("(copy inside)")
    after = [e for e in trace.events[end:] if e[0] == "alloc"]
    assert not [e for e in after if trace.sites[e[1]].operator.endswith("(copy inside)")]


def test_a_sum_in_a_wider_type_copies_what_it_sums() -> None:
    """The voxels of a mask are counted in int64: 8 bytes for each of them, within the call."""

    def step(_: Tracer) -> None:
        mask = torch.ones(1000, dtype=torch.bool)
        mask.sum()
        del mask
        torch.ones(1000).sum()

    assert traced(step).events == [
        *(("alloc", 0, 1000, 0), ("alloc", 1, 8, 0), ("alloc", 2, 8000, 0), ("free", 2)),
        *(("free", 1), ("free", 0)),
        *(("alloc", 3, 4000, 0), ("alloc", 4, 4, 0), ("free", 3), ("free", 4)),
    ]


def test_depthwise_3d_convolutions_take_no_workspace() -> None:
    def step(_: Tracer) -> None:
        image = torch.ones(1, 4, 8, 8, 8, requires_grad=True)
        nn.Conv3d(4, 4, 3, groups=4, bias=False)(image).sum().backward()

    assert not [e for e in traced(step).events if e[0] == "convolution"]


def test_the_first_matrix_product_asks_for_the_cublas_workspace_once() -> None:
    def step(_: Tracer) -> None:
        a = torch.ones(8, 8)
        a @ a
        a @ a

    events = [e for e in traced(step).events if e[0] == "cublas"]
    assert len(events) == 1
    assert isinstance(events[0][2], Site)


def test_categories_follow_the_owner() -> None:
    def step(tracer: Tracer) -> None:
        model = nn.Linear(10, 10, bias=False)
        optimizer = torch.optim.Adam(model.parameters(), foreach=True)
        image = torch.ones(5, 10)
        tracer.categorise(iter(model.parameters()), "parameter")
        tracer.categorise(iter([image]), "input")
        begun = len(tracer.trace.sites)
        loss = model(image).exp().sum()
        tracer.categorise_live_temporaries("activation", since=begun)
        loss.backward()
        tracer.categorise((p.grad for p in model.parameters() if p.grad is not None), "gradient")
        optimizer.step()
        states = optimizer.state.values()
        moments = (s[name] for s in states for name in ("exp_avg", "exp_avg_sq"))
        tracer.categorise(moments, "optimizer_state")

    trace = traced(step)
    by_category: dict[str, list[int]] = {}
    for event in trace.events:
        if event[0] == "alloc":
            by_category.setdefault(trace.categories[event[1]], []).append(event[2])
    assert by_category["parameter"] == [400]
    assert by_category["input"] == [200]
    assert by_category["gradient"] == [400]
    assert by_category["optimizer_state"] == [400, 400]
    assert (
        sum(by_category["activation"]) == 200 + 4
    )  # exp's output, kept for backward, and the loss


def test_nothing_is_recorded_once_stopped_and_hooks_are_gone() -> None:
    resize = torch.UntypedStorage.resize_
    with tracing() as tracer:
        kept = torch.ones(100)
        tracer.stop()
        del kept
        torch.ones(5)
    assert tracer.trace.events == [("alloc", 0, 400, 0)]
    assert torch.UntypedStorage.resize_ is resize
