"""The optimizer in backward: the ordinary loop's parameters, with one gradient alive at a time."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.build_workload import build_workload
from bench.case import Case, TechniqueUse
from bench.errors import MembenchError
from bench.predict.tracer import Tracer
from memsave.checkpoint import checkpoint_block
from memsave.errors import BackwardError, OptionError
from memsave.mixed_precision import MixedPrecision
from memsave.optimizer_in_backward import optimizer_in_backward
from tests.memsave.kept_bytes import LiveBytes

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
    "adam foreach": (torch.optim.Adam, {"lr": 0.1, "foreach": True}),
    "adam fused": (torch.optim.Adam, {"lr": 0.1, "fused": True}),
    "adamw amsgrad": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5}),
}


class _Net(nn.Module):
    """A weight used twice, a frozen one and one that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(5, 7), nn.Linear(7, 7)
        self.last, self.unused = nn.Linear(7, 3), nn.Linear(2, 2)
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(self.shared(self.first(x).tanh()).tanh())
        result: Tensor = self.last(y)
        return result


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": weights}, {"params": biases, "lr": 0.01}]


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6, start: int = 0
) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in range(start, start + steps):
        torch.manual_seed(step)
        for name, parameter in model.named_parameters():
            if name == "first.bias":
                parameter.requires_grad_(step >= 3)  # thawed in mid-training
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.randn(4, 5)).square().mean())
        optimizer.step()
        schedule.step()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_state_are_the_ordinary_loops_bit_for_bit(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    plain = _Net()
    model = copy.deepcopy(plain)
    ordinary = kind(_groups(plain), **options)
    optimizer = kind(_groups(model), **options)
    assert optimizer_in_backward(optimizer) is optimizer
    _train(plain, ordinary)
    _train(model, optimizer)
    for expected, actual in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, actual)
    assert _equal(ordinary.state_dict(), optimizer.state_dict())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("into", ["ordinary", "in backward"])
def test_a_saved_state_loads_with_and_without(into: str) -> None:
    torch.manual_seed(0)
    plain = _Net()
    model = copy.deepcopy(plain)
    ordinary = torch.optim.Adam(_groups(plain))
    optimizer = optimizer_in_backward(torch.optim.Adam(_groups(model)))
    source, target = (optimizer, ordinary) if into == "ordinary" else (ordinary, optimizer)
    _train(model if into == "ordinary" else plain, source, 4)
    target.load_state_dict(copy.deepcopy(source.state_dict()))  # as through a file
    weights = (model if into == "ordinary" else plain).state_dict()
    (plain if into == "ordinary" else model).load_state_dict(weights)
    _train(plain, ordinary, 3, start=4)
    _train(model, optimizer, 3, start=4)
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert _equal(ordinary.state_dict(), optimizer.state_dict())


def _chain(sides: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in pairwise(sides)))


def test_one_gradient_is_alive_at_a_time() -> None:
    """Weights 64x64, 64x32 and 32x8 in float32: together in the ordinary loop, else the largest.

    Beside it backward has the gradient of an activation, one sample of 64.
    """
    sides = (64, 64, 32, 8)
    together = (64 * 64 + 64 * 32 + 32 * 8) * 4
    peaks, left = {}, {}
    for in_backward in (False, True):
        model = _chain(sides)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, foreach=False
        )
        if in_backward:
            optimizer = optimizer_in_backward(optimizer)
        loss = model(torch.randn(1, 64)).sum()
        with LiveBytes() as live:
            torch.autograd.backward(loss)
            left[in_backward], peaks[in_backward] = live.now_bytes, live.peak_bytes
    assert left == {False: together, True: 0}
    largest = 64 * 64 * 4
    small = 4 * 64 * 4  # gradients of activations
    assert together <= peaks[False] <= together + small
    assert largest <= peaks[True] <= largest + small < together


def _case(**changes: Any) -> Case:
    fields: dict[str, Any] = {
        "network": "fcn",
        "variant": "test",
        "requested_shape": (8, 8, 8),
        "shape": (8, 8, 8),
        "network_options": {"widths": [4, 8]},
        "techniques": (TechniqueUse(name="optimizer_in_backward"),),
    }
    return Case(**{**fields, **changes})


def test_in_a_suites_step_no_gradient_is_left_for_the_optimizers_phase() -> None:
    """As the tracer sees it: bytes of gradients when the phase begins, all or none."""
    found = {}
    for techniques in ((), (TechniqueUse(name="optimizer_in_backward"),)):
        with FakeTensorMode():
            tracer = Tracer("cpu")
            with tracer.attributing(), tracer:
                workload = build_workload(_case(techniques=techniques), tracer.phase, "cpu")
                parameters = list(workload.model.parameters())
                seen: list[int] = []

                def mark(phase: str, parameters: Any = parameters, seen: Any = seen) -> None:
                    if phase == "optimizer":
                        seen.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))

                for _ in range(2):
                    workload.step(mark)
                tracer.stop()
        found[bool(techniques)] = seen
    total = sum(p.nbytes for p in parameters)
    assert found == {False: [total, total], True: [0, 0]}


def test_a_suites_step_trains_as_without_it() -> None:
    ends = []
    for techniques in ((), (TechniqueUse(name="optimizer_in_backward"),)):
        workload = build_workload(_case(techniques=techniques), lambda _: None, "cpu")
        for _ in range(3):
            workload.step(lambda _: None)
        ends.append(workload.model.state_dict())
    assert _equal(dict(ends[0]), dict(ends[1]))


def test_a_loss_scale_is_refused_before_anything_runs() -> None:
    with pytest.raises(MembenchError, match=r"'optimizer_in_backward' cannot be used at .* fp16"):
        build_workload(_case(precision="fp16"), lambda _: None, "cpu")


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_told_by_the_step_at_the_latest(fused: bool) -> None:
    model = _chain((3, 2))
    optimizer = optimizer_in_backward(torch.optim.SGD(model.parameters(), lr=0.1, fused=fused))
    precision = MixedPrecision("fp16", "cpu")
    with precision.forward():
        loss = model(torch.randn(4, 3)).float().sum()
    precision.backward(loss)
    with pytest.raises(BackwardError, match="scaled gradients"):
        precision.step(optimizer)


def test_a_second_backward_before_the_step_is_refused() -> None:
    model = _chain((3, 2))
    optimizer = optimizer_in_backward(torch.optim.SGD(model.parameters(), lr=0.1))
    torch.autograd.backward(model(torch.ones(1, 3)).sum())
    (weight,) = model.parameters()
    updated = weight.detach().clone()
    with pytest.raises(BackwardError, match="second backward before optimizer"):
        torch.autograd.backward(model(torch.ones(1, 3)).sum())
    assert torch.equal(weight, updated)
    optimizer.zero_grad()
    optimizer.step()
    torch.autograd.backward(model(torch.ones(1, 3)).sum())


def test_a_gradient_that_no_backward_made_is_told() -> None:
    model = _chain((3, 2))
    optimizer = optimizer_in_backward(torch.optim.SGD(model.parameters(), lr=0.1))
    (weight,) = model.parameters()
    weight.grad = torch.ones_like(weight)
    with pytest.raises(BackwardError, match="1 parameters have gradients that no backward made"):
        optimizer.step()


def test_a_group_added_later_takes_part() -> None:
    model = _chain((3, 4, 2))
    optimizer = optimizer_in_backward(torch.optim.SGD(model[0].parameters(), lr=0.1))
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
    before = [p.detach().clone() for p in model.parameters()]
    torch.autograd.backward(model(torch.ones(1, 3)).sum())
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert new.grad is None


def test_with_checkpoints_it_trains_the_same() -> None:
    plain = _Net()
    model = copy.deepcopy(plain)
    for block in (model.first, model.last):
        checkpoint_block(block)
    _train(plain, torch.optim.Adam(plain.parameters()))
    _train(model, optimizer_in_backward(torch.optim.Adam(model.parameters())))
    assert all(map(torch.equal, plain.parameters(), model.parameters()))


def test_what_it_cannot_be_combined_with_is_refused() -> None:
    model = _chain((3, 2))
    with pytest.raises(OptionError, match="LBFGS needs all gradients at once"):
        optimizer_in_backward(torch.optim.LBFGS(model.parameters()))
    hooked = torch.optim.SGD(model.parameters(), lr=0.1)
    hooked.register_step_pre_hook(lambda *_: None)
    with pytest.raises(OptionError, match="has hooks on its step"):
        optimizer_in_backward(hooked)
    scheduled = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)
    with pytest.raises(OptionError, match="make the scheduler after optimizer_in_backward"):
        optimizer_in_backward(scheduled)
    optimizer = optimizer_in_backward(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(OptionError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(OptionError, match="cannot be copied"):
            copied(optimizer)


def test_asked_twice_it_updates_once() -> None:
    model = _chain((3, 2))
    optimizer = optimizer_in_backward(torch.optim.SGD(model.parameters(), lr=0.5))
    assert optimizer_in_backward(optimizer) is optimizer
    (weight,) = model.parameters()
    before = weight.detach().clone()
    torch.autograd.backward(model(torch.ones(1, 3)).sum())
    assert torch.equal(weight, before - 0.5)
