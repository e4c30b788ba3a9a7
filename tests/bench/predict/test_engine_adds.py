"""Gradients that autograd adds up, against what it does when nothing watches it.

The judge is the profiler, in steps without any dispatch mode: it names what the engine itself ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler import profile

from bench.build_workload import build_workload
from bench.case import Case
from bench.predict.tracer import Tracer
from tests.bench.predict.test_tracer_against_real_steps import CASES

Step = Callable[[Tensor], Tensor]


class Doubled(torch.autograd.Function):
    """Adds in its own backward: that is not the engine's addition."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1 + gradients[0].sin()


def shared_by_a_view(x: Tensor) -> Tensor:
    return torch.cat([x, x.sin()]).cos().sum()


def skip_in_place(x: Tensor) -> Tensor:
    up = x.tanh() * 2.0
    up += x
    return up.sin().sum()


STEPS: dict[str, Step] = {
    "two readers": lambda x: (x.sin() + x.cos()).sum(),
    "three readers": lambda x: (x.sin() + x.cos() + x.tanh()).sum(),
    "a sum's gradient, one value for all, comes first": lambda x: x.sin().sum() + x.sum(),
    "a sum's gradient comes last": lambda x: x.sum() + x.sin().sum(),
    "another view holds the first gradient's storage": shared_by_a_view,
    "a skip added in place": skip_in_place,
    "formulas of two kinds": lambda x: torch.logsumexp(x, 0) + torch.nn.functional.gelu(x).sum(),
    "a Function that adds": lambda x: (Doubled.apply(x) + x).sum(),  # type: ignore[no-untyped-call]
}


def unwatched(run: Callable[[], object]) -> list[str]:
    """Return the engine's own additions in order, "add" or "add_"."""
    with profile() as profiler:
        run()
    found = []
    for event in profiler.function_events:
        parent = event.cpu_parent
        by_engine = parent is not None and "evaluate_function" in parent.name
        if by_engine and event.name in ("aten::add", "aten::add_"):
            found.append(event.name.removeprefix("aten::"))
    return found


def traced(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the same as the tracer has them."""
    from bench.predict.engine_adds import EngineAdds

    found: list[str] = []
    rule, engine_s = EngineAdds.operator, EngineAdds._added_by_engine

    def operator(self: EngineAdds, func: Any, args: tuple[Any, ...]) -> Any:
        chosen = rule(self, func, args)
        if func is torch.ops.aten.add.Tensor and engine_s(self, args):
            found.append(chosen.overloadpacket.__name__)
        return chosen

    monkeypatch.setattr(EngineAdds, "operator", operator)
    with FakeTensorMode(), Tracer("cpu"):
        run()
    return found


@pytest.mark.parametrize("name", STEPS)
def test_the_engine_adds_in_place_where_it_does_unwatched(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        leaf = torch.randn(64, requires_grad=True)
        STEPS[name](leaf * 1.0).backward()  # type: ignore[no-untyped-call]

    assert traced(run, monkeypatch) == unwatched(run) != []


def test_a_gradient_that_somebody_holds_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An addition hands its gradient on as it is, and the hook has it too."""

    def run() -> None:
        held: list[Tensor] = []
        leaf = torch.randn(64, requires_grad=True)
        x = leaf * 1.0
        first = x.sin()
        last = x + 1.0  # made last, so its gradient comes first
        last.register_hook(held.append)  # type: ignore[no-untyped-call]
        torch.autograd.grad((first * last.cos()).sum(), leaf)

    assert traced(run, monkeypatch) == unwatched(run) == ["add"]


@pytest.mark.parametrize("name", ["float32", "ccblock", "in-place ABN", "checkpoint", "bfloat16"])
def test_a_network_s_gradients_are_added_as_they_are_unwatched(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: Case = CASES[name]

    def run() -> None:
        build_workload(case, lambda _phase: None, "cpu").step(lambda _phase: None)

    assert traced(run, monkeypatch) == unwatched(run) != []


def test_the_sum_takes_no_memory_of_its_own() -> None:
    """Two gradients of 4096 bytes and the gradients of sin and cos: no third one for their sum."""
    with FakeTensorMode():
        tracer = Tracer("cpu")
        with tracer:
            leaf = torch.empty(1024, requires_grad=True)
            x = leaf * 1.0
            end = (x.sin() + x.cos()).sum()
            begun = len(tracer.trace.sites)
            torch.autograd.grad(end, x)
    made = [e[2] for e in tracer.trace.events if e[0] == "alloc" and e[1] >= begun]
    # The sum's gradient, 1; sin's: a cosine, a product; cos's: a sine, its negative, a product.
    assert sorted(made) == [4, *[4096] * 5]
