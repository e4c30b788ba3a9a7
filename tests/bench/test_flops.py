"""FLOPs of a step: by hand from shapes, against torch's counter, and what is computed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.case import TechniqueUse
from bench.flops import FlopCount, Flops, flops_of
from bench.predict.alloc_conf import parse_alloc_conf
from bench.predict.cards import find_card
from bench.predict.predictor import predict, trace_case
from memsave import networks
from tests.bench.records import make_case

aten = torch.ops.aten
CHECKPOINT = TechniqueUse(name="checkpoint")


SMALL: dict[str, dict[str, Any]] = {
    "fcn": {"requested_shape": (16, 16, 16), "network_options": {"widths": [4, 8]}},
    "dense_vnet": {"requested_shape": (16, 16, 16), "loss": "focal"},
    "light_unet": {"requested_shape": (16, 16, 16), "loss": "focal"},
    "pocketnet_3d": {"requested_shape": (32, 32, 3), "loss": "l2_dice"},
    "pocketnet_2d": {"requested_shape": (32, 32), "loss": "l2_dice"},
    "conv_lstm_unet": {"requested_shape": (32, 32), "loss": "binary_cross_entropy"},
    "conv_lstm": {"requested_shape": (32, 32, 4), "loss": "binary_cross_entropy"},
}


def flops_of_step(network: str, **overrides: Any) -> Flops:
    case = make_case(network=network)
    fields = {**SMALL[network], **overrides}
    fields.setdefault("shape", fields["requested_shape"])
    trace, _ = trace_case(case.from_definition({**case.to_definition(), **fields}), "cpu")
    return trace.flops


def use(name: str, **options: Any) -> dict[str, Any]:
    return {"techniques": [{"name": name, "options": options}]}


def convolved(groups: int, mask: tuple[bool, bool, bool]) -> tuple[Any, ...]:
    """Arguments of a convolution's backward: 4 channels to 4, 3x3, on 5x5, batch 2, padded by 1."""
    source, gradient = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    weight = torch.randn(4, 4 // groups, 3, 3)
    return (gradient, source, weight, [4], [1, 1], [1, 1], [1, 1], False, [0, 0], groups, mask)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask", [(True, False, False), (False, True, True)])
def test_each_gradient_of_a_convolution_costs_as_much_as_its_forward(
    groups: int, mask: tuple[bool, bool, bool]
) -> None:
    """2 samples x 25 voxels x 9 taps x 4 outputs x 4/groups inputs x 2; torch's own counter
    makes the weight's gradient ``groups`` times as much."""
    arguments = convolved(groups, mask)
    result = aten.convolution_backward(*arguments)
    expected = 2 * 25 * 9 * 4 * (4 // groups) * 2
    assert flops_of(aten.convolution_backward, arguments, None, result) == expected


def test_operators_without_a_formula_cost_nothing() -> None:
    x = torch.randn(3)
    assert flops_of(aten.add, (x, x), {}, x) == 0


def test_a_matrix_product_costs_two_for_each_multiplication() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert flops_of(aten.mm, (a, b), None, a @ b) == 2 * 3 * 4 * 5


@pytest.mark.parametrize("network", ["fcn", "pocketnet_3d", "conv_lstm"])
def test_the_forward_costs_what_torch_s_counter_says(network: str) -> None:
    spec = networks.find_network(network)
    options = SMALL[network].get("network_options", {})
    shape = spec.image_shape(options, 1, SMALL[network]["requested_shape"])
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        networks.build(network, options)(torch.empty(shape))
    assert flops_of_step(network).forward == counter.get_total_flops() > 0


@pytest.mark.parametrize("network", ["fcn", "dense_vnet", "pocketnet_2d", "conv_lstm_unet"])
def test_what_a_checkpoint_computes_twice_is_what_the_plain_step_lacks(network: str) -> None:
    plain, again = flops_of_step(network), flops_of_step(network, **use("checkpoint"))
    assert plain.recomputed == 0
    assert plain.recomputation_factor == 1
    assert again.total - again.recomputed == plain.total
    assert 0 < again.recomputed <= again.forward == plain.forward


def test_states_of_a_recurrent_network_make_every_slice_run_twice() -> None:
    """But for what follows a slice's last convolution: nothing that counts."""
    plain = flops_of_step("conv_lstm")
    for every in (1, 2, 4):
        again = flops_of_step("conv_lstm", **use("checkpoint_steps", every=every))
        assert again.total == plain.total + plain.forward
        assert again.recomputed == plain.forward


def test_a_predicted_record_says_its_flops_and_how_much_is_computed_twice() -> None:
    """The light U-Net's stem sees the image, which needs no gradient: not quite 3 forwards."""
    case = make_case(network="light_unet", requested_shape=(16, 16, 16), techniques=(CHECKPOINT,))
    readings = predict(case, find_card("v100-32gb"), "cpu", parse_alloc_conf(""))
    trace, _ = trace_case(case, "cpu")
    assert readings["forward_flops"] == trace.flops.forward
    assert readings["step_flops"] == trace.flops.total
    factor = readings["recomputation_factor"]
    assert factor == trace.flops.total / (trace.flops.total - trace.flops.recomputed)
    assert 1.2 < factor < 4 / 3 + 0.01


def test_a_prediction_costs_its_forward_and_nothing_more() -> None:
    flops = flops_of_step("light_unet", mode="infer")
    assert flops == Flops(flops.forward, 0, flops.forward)
    assert flops.forward == flops_of_step("light_unet").forward


def test_depthwise_convolutions_train_at_three_times_their_forward() -> None:
    """A depthwise layer and a pointwise one behind a layer of parameters: each gradient is one
    forward; only the first layer's input needs none."""
    model = nn.Sequential(nn.Conv3d(1, 8, 1), nn.Conv3d(8, 8, 3, padding=1, groups=8))
    count = FlopCount()
    image = torch.randn(1, 1, 4, 4, 4)
    first, depthwise = 2 * 8 * 64, 2 * 8 * 27 * 64

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            count.add(func.overloadpacket, args, kwargs, result, in_module=False)
            return result

    with Counting():  # type: ignore[no-untyped-call]
        loss = model(image).sum()
        count.phase = "backward"
        loss.backward()
    assert count.counted == Flops(first + depthwise, 0, 2 * first + 3 * depthwise)


def test_a_step_forgets_the_one_before_and_a_period_can_be_repeated() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    count = FlopCount()
    count.add(aten.mm, (a, b), None, a @ b, in_module=True)
    before = count.counted
    count.phase = "backward"
    count.add(aten.mm, (a, b), None, a @ b, in_module=True)
    count.repeat(before, times=3)
    assert count.counted == Flops(120, 4 * 120, 5 * 120)
    count.start()
    assert count.counted == Flops()
    assert count.counted.recomputation_factor is None
