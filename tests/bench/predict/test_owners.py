"""Parameters, gradients and optimizer state carry the name of the module that owns them."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.case import Case
from bench.predict.owners import categorise_gradients
from bench.predict.predictor import trace_case
from bench.predict.tracer import Tracer

SHAPE = (16, 16, 24)


@pytest.fixture(scope="module")
def live_bytes() -> dict[tuple[str, str], int]:
    """(module, category) -> bytes alive at the second step's optimizer phase."""
    options = {"widths": [4, 8]}
    case = Case(
        network="fcn", variant="v", requested_shape=SHAPE, shape=SHAPE, network_options=options
    )
    trace, _ = trace_case(case, "cpu")
    end = [n for n, event in enumerate(trace.events) if event == ("phase", "optimizer")][1]
    live: dict[int, int] = {}
    for event in trace.events[:end]:
        if event[0] == "alloc":
            live[event[1]] = event[2]
        elif event[0] == "free":
            live.pop(event[1])
    totals: dict[tuple[str, str], int] = defaultdict(int)
    for identity, size in live.items():
        totals[(trace.sites[identity].module, trace.categories[identity])] += size
    return totals


def test_weights_gradients_and_moments_are_the_convolutions_own(
    live_bytes: dict[tuple[str, str], int],
) -> None:
    """encoder.1.conv2 is 4 -> 8 channels, 3 wide, without bias; Adam keeps two moments."""
    weight_bytes = 4 * 8 * 27 * 4
    module = "encoder.1.conv2"
    assert live_bytes[(module, "parameter")] == weight_bytes
    assert live_bytes[(module, "gradient")] == weight_bytes
    # And on the CPU tracer the step counter, a float32, lies on the traced device too.
    assert live_bytes[(module, "optimizer_state")] == 2 * weight_bytes + 4


def test_nothing_of_a_parameter_is_left_without_a_module(
    live_bytes: dict[tuple[str, str], int],
) -> None:
    ours = ("parameter", "gradient", "optimizer_state")
    assert [category for module, category in live_bytes if not module and category in ours] == []


def test_a_gradient_that_no_module_made_is_its_parameters_owners() -> None:
    """As one that a hook or an accumulation allocated."""
    with FakeTensorMode():
        tracer = Tracer("cpu")
        with tracer.attributing(), tracer:
            layer = nn.Linear(2, 3, bias=False)
            parameter = layer.weight
            parameter.grad = torch.zeros_like(parameter)
            categorise_gradients(tracer, nn.Sequential(layer))
            tracer.stop()
    assert (tracer.trace.sites[-1].module, tracer.trace.categories[-1]) == ("0", "gradient")
