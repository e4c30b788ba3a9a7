"""Checkpoints by a budget: the bytes it foresees are those that live, the rest is exact."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.block_costs import measure_blocks
from memsave.checkpoint_budget import (
    budget_bytes,
    budget_choices,
    checkpoint_budget,
    plan_checkpoints,
)
from memsave.errors import OptionError, RefusedError, UnknownNameError
from memsave.networks import FCN
from memsave.networks.conv_lstm import ConvLSTM
from memsave.placement import Placement
from memsave.techniques import find_technique, parse_options
from tests.memsave.kept_bytes import LiveBytes, saved_bytes

N, C, SIDE = 1, 4, 16
RESULT = N * C * SIDE * SIDE * 4


def _layers(depth: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.Conv2d(C, C, 3, padding=1, bias=False),
                nn.BatchNorm2d(C),
                nn.Dropout(0.25),
                nn.LeakyReLU(inplace=True),
            )
            for _ in range(depth)
        )
    )


def _image() -> Tensor:
    return torch.randn(N, C, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def _step(model: nn.Module, x: Tensor) -> tuple[int, list[Tensor]]:
    """Return the peak of a forward and backward in bytes, and what came of it."""
    torch.manual_seed(1)
    with LiveBytes() as live:
        result = model(x)
        torch.autograd.backward(result, torch.ones_like(result))
        seen = result.detach()
        del result
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return live.peak_bytes, [seen, *gradients, *model.buffers()]


def _placement(model: Any) -> Placement:
    if isinstance(model, nn.Sequential):
        planner: Any = model.planner
        (placement,) = planner.plans.values()
    else:
        (hook,) = model._forward_pre_hooks.values()
        (placement,) = hook.plans.values()
    assert isinstance(placement, Placement)
    return placement


def test_a_block_is_measured_to_the_byte() -> None:
    """Conv keeps its input, a result before; norm its input; dropout a mask; leaky its own."""
    model = _layers(2)
    costs = measure_blocks(model, ["0", "1"], (_image(),), joined=True)
    norm_bytes = 2 * C * 4  # mean and 1/std of the batch
    mask = RESULT  # dropout on a CPU keeps its mask in the input's type
    assert [b.result_bytes for b in costs.blocks] == [RESULT, RESULT]
    # the convolution's result and the mask; the activation's result is the block's own
    assert [b.inside_bytes for b in costs.blocks] == [RESULT + mask + norm_bytes] * 2
    flops = 2 * 9 * C * C * SIDE * SIDE
    assert [b.cost for b in costs.blocks] == [flops + RESULT] * 2
    kept = saved_bytes(lambda: model(_image()), model)
    # saved_bytes counts the image, which the first convolution keeps, and the last result
    assert kept == sum(b.inside_bytes + b.result_bytes for b in costs.blocks) + RESULT
    assert costs.base_bytes == 0


def test_measuring_leaves_no_trace() -> None:
    model = _layers(3)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with LiveBytes() as live:
        measure_blocks(model, ["0", "1", "2"], (_image(),))
    assert live.peak_bytes <= RESULT  # the image
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5, None])
def test_a_sequence_stays_within_its_budget_and_is_exact(share: float | None) -> None:
    plain = _layers()
    model = checkpoint_budget(copy.deepcopy(plain), share=share)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain_peak, expected = _step(plain, _image())
    peak, actual = _step(model, _image())
    for a, b in zip(expected, actual, strict=True):
        assert torch.equal(a, b)
    placement = _placement(model)
    # Beside what is foreseen live the parameters' gradients and the gradient that we gave.
    extra = sum(p.nbytes for p in model.parameters()) + RESULT
    assert peak <= placement.peak_bytes + extra
    if share == 1.0:
        assert placement.segments == ()
    else:
        assert peak < plain_peak
        assert any(stop - start > 1 for start, stop in placement.segments)


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
def test_an_fcn_stays_within_its_budget_and_is_exact(norm: str) -> None:
    """The peak is foreseen within 3 %: the loss's and the weights' gradients are not in it."""
    torch.manual_seed(0)
    plain = FCN(widths=(8, 16, 32), norm=norm)
    image = torch.randn(1, 1, 16, 16, 16)
    technique = find_technique("checkpoint_budget")
    assert technique.exact
    model = technique.module(copy.deepcopy(plain), parse_options(technique, {}))
    plain_peak, expected = _step(plain, image)
    peak, actual = _step(model, image)
    for a, b in zip(expected, actual, strict=True):
        assert torch.equal(a, b)
    assert peak < plain_peak
    placement = _placement(model)
    assert placement.recomputed
    weights = sum(p.nbytes for p in model.parameters())
    assert 0.97 * placement.peak_bytes - weights <= peak <= 1.03 * placement.peak_bytes + weights


def test_less_is_recomputed_where_more_is_allowed() -> None:
    plain = FCN(widths=(8, 16, 32))
    costs = measure_blocks(plain, plain.checkpointable_blocks(), (torch.randn(1, 1, 16, 16, 16),))
    least = plan_checkpoints(costs)
    most = plan_checkpoints(costs, share=1.0)
    between = plan_checkpoints(costs, (least.peak_bytes + most.peak_bytes) // 2)
    assert 0 == most.cost < between.cost <= least.cost
    assert least.peak_bytes <= between.peak_bytes < most.peak_bytes
    with pytest.raises(OptionError, match=rf"take a budget of {least.peak_bytes} bytes or more"):
        plan_checkpoints(costs, least.peak_bytes - 1)


def test_each_shape_has_a_placement_of_its_own() -> None:
    model = checkpoint_budget(FCN(widths=(4, 8)), budget="140 KiB")
    (hook,) = model._forward_pre_hooks.values()
    for side in (8, 16, 8):
        torch.autograd.backward(model(torch.randn(1, 1, side, 8, 8)).sum())
    small, large = hook.plans.values()  # type: ignore[attr-defined]
    assert small.recomputed == ()
    assert large.recomputed
    assert not any(type(m).__name__.startswith("Checkpointed") for m in model.modules())
    with torch.no_grad():
        model(torch.randn(1, 1, 24, 8, 8))
    assert len(hook.plans) == 2  # type: ignore[attr-defined]


def test_apply_takes_a_sequence() -> None:
    applied = memsave.apply(_layers(), [("checkpoint_budget", {"share": 0.6})])
    _step(applied.model, _image())
    assert _placement(applied.model).segments


def test_recomputed_norms_are_measured_as_they_are_kept() -> None:
    """In their scope a block no longer keeps the norm's result: the next convolution's input."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(),
                            nn.Conv2d(C, C, 3, padding=1)) for _ in range(2)]  # fmt: skip
    plain = measure_blocks(nn.Sequential(*layers), ["0", "1"], (_image(),))
    memsave.recompute_pairs(model := nn.Sequential(*layers))
    with memsave.recompute(model):
        recomputed = measure_blocks(model, ["0", "1"], (_image(),))
    for before, after in zip(plain.blocks, recomputed.blocks, strict=True):
        assert before.inside_bytes - after.inside_bytes == RESULT


def test_a_copy_has_the_budget_too() -> None:
    model = checkpoint_budget(_layers(4), share=0.7)
    other = pickle.loads(pickle.dumps(model))
    assert type(other) is type(model)
    _step(other, _image())
    assert _placement(other).segments


@pytest.mark.parametrize(
    ("text", "size"),
    [("2 GiB", 2**31), ("512MiB", 2**29), (" 1.5 KiB ", 1536), ("7 B", 7), (12345, 12345)],
)
def test_a_budget_is_read(text: str | int, size: int) -> None:
    assert budget_bytes(text) == size


@pytest.mark.parametrize("budget", ["2 GB", "two", "", 0, -1, "0 GiB"])
def test_a_budget_that_cannot_be_read_is_refused(budget: Any) -> None:
    with pytest.raises(OptionError, match="budget must be bytes, or text such as '2 GiB'"):
        parse_options(find_technique("checkpoint_budget"), {"budget": budget})


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(OptionError, match=r"share must be more than 0 and at most 1, got 1\.5"):
        checkpoint_budget(_layers(), share=1.5)
    with pytest.raises(OptionError, match="give budget or share, not both"):
        checkpoint_budget(_layers(), 100, share=0.5)
    with pytest.raises(OptionError, match=r"no nn\.Sequential and names no blocks"):
        checkpoint_budget(nn.Conv2d(1, 1, 1))
    recurrent = checkpoint_budget(ConvLSTM(widths=(2, 4)))
    with pytest.raises(OptionError, match=r"once in a forward, got unet\.encoder\.0 3 times"):
        recurrent(torch.randn(1, 1, 4, 4, 3))
    with pytest.raises(OptionError, match="must be of type int"):
        parse_options(find_technique("checkpoint_budget"), {"budget": [1]})
    with pytest.raises(UnknownNameError):
        parse_options(find_technique("checkpoint_budget"), {"bugdet": 1})


NAMES = ("checkpoint", "checkpoint_selective", "checkpoint_budget")


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_of_the_ways_to_checkpoint_blocks_a_network_takes_one(first: str, second: str) -> None:
    """Either order; checkpoint twice is once, and so is checkpoint_selective."""
    model: nn.Module = FCN(widths=(4, 8))
    one, other = find_technique(first), find_technique(second)
    model = one.module(model, parse_options(one, {}))
    if first == second != "checkpoint_budget":
        assert other.module(model, parse_options(other, {})) is model
        return
    with pytest.raises(RefusedError, match=r"already|decides by itself"):
        other.module(model, parse_options(other, {}))


def test_a_sequence_has_one_budget() -> None:
    with pytest.raises(RefusedError, match="checkpointed already: a budget decides"):
        checkpoint_budget(checkpoint_budget(_layers()))


def test_the_choices_are_budgets_that_ask_for_the_placements_named() -> None:
    measured = checkpoint_budget(_layers())
    measured(_image()).sum().backward()

    choices = budget_choices(measured)

    assert choices[0].recomputed == ()
    assert len(choices) > 2
    for choice in choices:
        model = checkpoint_budget(_layers(), choice.peak_bytes)
        model(_image())
        assert _placement(model) == choice
    assert choices[-1] == _placement(measured)


def test_the_choices_of_a_model_with_named_blocks_are_found_within_another() -> None:
    network = checkpoint_budget(FCN(widths=[4, 8]))
    around = nn.ModuleDict({"part": network})
    network(torch.randn(1, 1, 8, 8, 8))

    assert budget_choices(around) == budget_choices(network)
    assert budget_choices(around)[-1] == _placement(network)


def test_a_model_that_has_not_run_has_no_choices() -> None:
    model = checkpoint_budget(_layers())
    with torch.no_grad():
        model(_image())

    with pytest.raises(OptionError, match="has not been measured: call checkpoint_budget, then"):
        budget_choices(model)
