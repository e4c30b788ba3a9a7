"""Recomputed norm and activation: the plain pair's bits, in the bytes of its input alone."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memsave.errors import OptionError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.recompute_pairs import recompute_pair, recompute_pairs
from memsave.recomputed_norm_act import Order, RecomputedNormAct, recompute
from tests.memsave.kept_bytes import LiveBytes, saved_bytes
from tests.memsave.recompute_twins import WideGroupNorm

N, C, H, W = 2, 4, 6, 5
ACTIVATION_BYTES = N * C * H * W * 4

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(C),
    "batch, average": lambda: nn.BatchNorm2d(C, momentum=None),
    "batch, no statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
    "instance, plain": lambda: nn.InstanceNorm2d(C),
    "group": lambda: nn.GroupNorm(2, C),
    "layer": lambda: nn.LayerNorm([C, H, W]),
    "group, float32": lambda: WideGroupNorm(2, C),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "leaky_relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "leaky_relu, negative slope": lambda: nn.LeakyReLU(-0.1),
    "elu in place": lambda: nn.ELU(inplace=True),
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "prelu": lambda: nn.PReLU(C),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}
ORDERS: tuple[Order, ...] = ("norm_act", "act_norm")


def conv() -> nn.Conv2d:
    return nn.Conv2d(C, C, 3, padding=1)


def plain_network(norm: str, activation: str, order: Order) -> nn.Sequential:
    """Twice convolution and pair, then a convolution, which keeps the last pair's result."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(2):
        pair = [NORMS[norm](), ACTIVATIONS[activation]()]
        layers += [conv(), *(pair if order == "norm_act" else pair[::-1])]
    network = nn.Sequential(*layers, conv())
    with torch.no_grad():
        for parameter in network.parameters():  # no weight of 1, no bias of 0
            parameter.add_(torch.randn_like(parameter) / 8)
    return network


def recomputed(plain: nn.Module) -> nn.Module:
    model = copy.deepcopy(plain)
    assert recompute_pairs(model) > 0
    return model


def run(
    model: nn.Module, half: torch.dtype | None = None, scope: bool = False, steps: int = 2
) -> list[Tensor]:
    """Losses of some steps, and every gradient and buffer after them."""
    torch.manual_seed(1)
    x = torch.randn(N, C, H, W, requires_grad=True)
    losses = []
    for _ in range(steps):
        precision = torch.autocast("cpu", dtype=half, enabled=half is not None)
        with recompute(model) if scope else nullcontext(), precision:
            loss = model(x).float().square().mean()
        torch.autograd.backward(loss)
        losses.append(loss.detach())
    assert x.grad is not None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*losses, x.grad, *gradients, *model.buffers()]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_gives_the_plain_networks_bits(norm: str, order: Order) -> None:
    """Losses of two steps, gradients and running statistics, which are updated once a step."""
    for activation in ("relu in place", "leaky_relu", "gelu"):
        plain = plain_network(norm, activation, order)
        assert_same_bits(run(recomputed(plain), scope=True), run(plain))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_gives_the_plain_networks_bits(activation: str, order: Order) -> None:
    for norm in ("batch", "group"):
        plain = plain_network(norm, activation, order)
        assert_same_bits(run(recomputed(plain), scope=True), run(plain))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", ["batch", "instance", "group", "group, float32"])
def test_mixed_precision_gives_the_plain_networks_bits(
    norm: str, order: Order, half: torch.dtype
) -> None:
    for activation in ("relu in place", "prelu"):
        plain = plain_network(norm, activation, order)
        assert_same_bits(run(recomputed(plain), half, scope=True), run(plain, half))


@pytest.mark.parametrize("order", ORDERS)
def test_channels_last_gives_the_plain_networks_bits(order: Order) -> None:
    for norm in ("batch", "instance", "group"):
        plain = plain_network(norm, "relu", order).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert_same_bits(run(recomputed(plain), scope=True), run(plain))


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_sides_work_as_two(dims: int) -> None:
    norms: dict[int, Any] = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}
    convs: dict[int, Any] = {1: nn.Conv1d, 3: nn.Conv3d}
    torch.manual_seed(0)
    plain = nn.Sequential(convs[dims](C, C, 3), norms[dims](C), nn.ReLU(), convs[dims](C, C, 1))
    mine = recomputed(plain)
    x = torch.randn(N, C, *(5, 4, 3)[:dims])
    torch.autograd.backward(plain(x).square().sum())
    with recompute(mine):
        torch.autograd.backward(mine(x).square().sum())
    assert_same_bits(
        [p.grad for p in mine.parameters() if p.grad is not None],
        [p.grad for p in plain.parameters() if p.grad is not None],
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_evaluation_rebuilds_with_the_statistics_of_its_forward(norm: str, order: Order) -> None:
    """A training step between an evaluation's forward and backward does not change its result."""
    plain = plain_network(norm, "relu", order)
    run(plain)  # running statistics that are not 0 and 1
    plain.zero_grad()
    mine = recomputed(plain.eval())
    x = torch.randn(N, C, H, W)
    weight = torch.randn(N, C, H, W)
    loss = (plain(x) * weight).sum()
    torch.autograd.backward(loss)
    with recompute(mine):
        actual = (mine(x) * weight).sum()
        mine.train()(x + 1)  # other running statistics, another mode
    assert torch.equal(actual, loss)
    before = [b.clone() for b in mine.buffers()]
    mine.zero_grad()
    torch.autograd.backward(actual)
    # the last convolution's: the norms' own backward reads what the running statistics have become
    a, b = mine.get_submodule("6"), plain.get_submodule("6")
    assert_same_bits([a.weight.grad], [b.weight.grad])  # type: ignore[list-item]
    assert_same_bits(list(mine.buffers()), before)


def test_running_statistics_are_updated_once_a_step_and_never_in_backward() -> None:
    mine = recomputed(plain_network("batch", "relu", "norm_act"))
    x = torch.randn(N, C, H, W)
    with recompute(mine):
        loss = mine(x).sum()
    after_forward = [b.clone() for b in mine.buffers()]
    assert [int(b) for n, b in mine.named_buffers() if n.endswith("tracked")] == [1, 1]
    torch.autograd.backward(loss)
    assert_same_bits(list(mine.buffers()), after_forward)


def test_gradcheck_and_double_backward_hold_in_float64() -> None:
    torch.manual_seed(0)
    for order in ORDERS:
        pair = RecomputedNormAct(nn.BatchNorm2d(3), nn.Softplus(), order=order).double()
        behind = nn.Conv2d(3, 2, 2).double()
        weights = [*pair.parameters(), *behind.parameters()]

        def step(x: Tensor, *_: Tensor, pair: nn.Module = pair, behind: nn.Module = behind) -> Any:
            with recompute(pair):
                return behind(pair(x * 1))

        x = torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(step, (x, *weights))
        assert torch.autograd.gradgradcheck(step, (x, *weights))


@pytest.mark.parametrize(
    "activation", ["relu", "relu in place", "leaky_relu", "leaky_relu in place"]
)
def test_norm_then_activation_keeps_what_in_place_abn_keeps(activation: str) -> None:
    """The input, x of two pairs and a mean and a 1/std a channel; plain: 2 or 4 maps more."""
    plain = plain_network("batch", activation, "norm_act")
    mine = recomputed(plain)
    x = torch.randn(N, C, H, W)
    maps = 4 if activation == "leaky_relu" else 2  # not in place it keeps the norm's result too
    statistics = 2 * 2 * C * 4
    assert saved_bytes(lambda: plain(x), plain) == (3 + maps) * ACTIVATION_BYTES + statistics
    assert saved_bytes(lambda: _in_scope(mine, x), mine) == 3 * ACTIVATION_BYTES + statistics
    abn = nn.Sequential(conv(), InPlaceABN(C), conv(), InPlaceABN(C), conv())
    one_number_a_channel = 2 * C * 4
    assert saved_bytes(lambda: abn(x), abn) == 3 * ACTIVATION_BYTES + one_number_a_channel


def _in_scope(model: nn.Module, x: Tensor) -> Tensor:
    with recompute(model):
        result: Tensor = model(x)
    return result


@pytest.mark.parametrize("norm", ["instance, plain", "group", "layer"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "prelu"])
def test_other_norms_and_activations_keep_the_norms_input_alone(norm: str, activation: str) -> None:
    """Statistics are of each sample and channel, group or layer."""
    mine = recomputed(plain_network(norm, activation, "norm_act"))
    x = torch.randn(N, C, H, W)
    numbers = {"instance, plain": N * C, "group": N * 2, "layer": N}[norm]
    expected = 3 * ACTIVATION_BYTES + 2 * 2 * numbers * 4
    assert saved_bytes(lambda: _in_scope(mine, x), mine) == expected


@pytest.mark.parametrize("activation", ["relu", "relu in place", "leaky_relu", "gelu"])
def test_activation_then_norm_keeps_one_map(activation: str) -> None:
    """Its output for a ReLU, its input where the activation keeps that."""
    mine = recomputed(plain_network("batch", activation, "act_norm"))
    x = torch.randn(N, C, H, W)
    expected = 3 * ACTIVATION_BYTES + 2 * 2 * C * 4
    assert saved_bytes(lambda: _in_scope(mine, x), mine) == expected


@pytest.mark.parametrize("norm", ["batch", "group, float32", "instance, plain"])
def test_under_autocast_half_of_the_convolutions_result_is_all_that_is_kept(norm: str) -> None:
    """A norm may compute in float32; the copies around it are not kept."""
    mine = recomputed(plain_network(norm, "relu", "norm_act"))
    x = torch.randn(N, C, H, W, dtype=torch.bfloat16)

    def step() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return _in_scope(mine, x)

    weights = 3 * C * C * 9 * 2  # the convolutions' weights in half, which autocast made
    # a mean and a 1/std each; without weights they have the activation's type
    numbers_bytes = {"batch": C * 4, "group, float32": N * 2 * 4, "instance, plain": N * C * 2}[
        norm
    ]
    expected = 3 * ACTIVATION_BYTES // 2 + 2 * 2 * numbers_bytes + weights
    assert saved_bytes(step, mine) == expected


def test_backward_needs_one_map_more_than_its_gradients() -> None:
    """z is made over no second map, and is gone when the ReLU before it is done."""
    mine = nn.Sequential(RecomputedNormAct(nn.BatchNorm2d(C), nn.ReLU()), conv())
    x = torch.randn(N, C, 32, 32, requires_grad=True)
    one_map = x.nbytes
    loss = _in_scope(mine, x * 1).sum()
    with LiveBytes() as live:
        torch.autograd.backward(loss)
    # convolution: z and dz; ReLU: z, dz and dy; its other numbers are of a channel's size, and the
    # gradient of the sum is expanded, so made dense by the convolution: one map more with z and dz
    small = 4 * (C * C * 9 * 4 + 16 * C * 4)
    assert 3 * one_map <= live.peak_bytes <= 3 * one_map + small


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"])
def test_z_is_made_over_the_norms_result(activation: str) -> None:
    mine = nn.Sequential(RecomputedNormAct(nn.BatchNorm2d(C), ACTIVATIONS[activation]()), conv())
    x = torch.randn(N, C, 32, 32)
    result: Any = _in_scope(mine, x * 1)
    with LiveBytes() as live:
        assert result.grad_fn._saved_input.shape == x.shape
    assert x.nbytes <= live.peak_bytes <= x.nbytes + 16 * C * 4


def test_what_z_was_made_of_dies_with_the_graph_though_somebody_holds_z() -> None:
    """At once, at the end of the scope, and not when the garbage collector comes by."""
    pair = RecomputedNormAct(nn.BatchNorm2d(C), nn.ReLU())
    gc.disable()
    try:
        with recompute(pair):
            x = torch.randn(N, C, H, W) * 1
            kept = weakref.ref(x.untyped_storage())
            z = pair(x).detach()
            del x
        assert kept() is None
    finally:
        gc.enable()
    assert z.shape == (N, C, H, W)


def test_z_itself_is_not_referenced_by_the_graph() -> None:
    """After the forward x and the gradient's own maps are left, and z's storage is freed."""
    mine = nn.Sequential(conv(), RecomputedNormAct(nn.BatchNorm2d(C), nn.ReLU()), conv(), nn.Tanh())
    x = torch.randn(N, C, 32, 32)
    with LiveBytes() as live:
        result = _in_scope(mine, x)
    small = 32 * C * 4
    assert 2 * x.nbytes <= live.now_bytes <= 2 * x.nbytes + small  # the norm's input; tanh's result
    del result


@pytest.mark.parametrize("name", ["batch", "instance", "group"])
def test_state_dicts_are_the_plain_models_both_ways(name: str) -> None:
    plain = plain_network(name, "prelu", "norm_act")
    run(plain)
    plain.zero_grad()
    mine = recomputed(plain_network(name, "prelu", "norm_act"))
    assert list(mine.state_dict()) == list(plain.state_dict())
    assert mine.load_state_dict(plain.state_dict()).missing_keys == []
    assert_same_bits(list(mine.state_dict().values()), list(plain.state_dict().values()))
    assert plain.load_state_dict(mine.state_dict()).unexpected_keys == []
    assert_same_bits(run(copy.deepcopy(mine), scope=True), run(plain))


def test_alone_it_has_the_norms_keys_and_takes_its_own() -> None:
    norm = nn.BatchNorm2d(C)
    pair = RecomputedNormAct(norm, nn.PReLU())
    assert set(pair.state_dict()) == {*norm.state_dict(), "activation.weight"}
    pair.load_state_dict(pair.state_dict())
    assert pair.norm is norm


@pytest.mark.parametrize(
    ("norm", "activation", "message"),
    [
        (nn.SyncBatchNorm(C), nn.ReLU(), "SyncBatchNorm"),
        (InPlaceABN(C), None, "InPlaceABN overwrites"),
        (InPlaceGroupNorm(2, C), None, "InPlaceGroupNorm overwrites"),
        (InPlaceInstanceNorm(C), None, "InPlaceInstanceNorm overwrites"),
        (nn.BatchNorm2d(C), nn.RReLU(), "RReLU draws random"),
        (nn.BatchNorm2d(C), nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), "Dropout draws random"),
        (None, nn.ReLU(), "norm must be a module"),
        (nn.BatchNorm2d(C), torch.relu, "activation must be a module"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_recomputed_is_refused(norm: Any, activation: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RecomputedNormAct(norm, activation)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(OptionError, match="'norm_act' or 'act_norm', got 'both'"):
        RecomputedNormAct(nn.BatchNorm2d(C), nn.ReLU(), order="both")  # type: ignore[arg-type]


def test_a_norm_converted_to_a_synchronised_one_is_refused_at_the_forward() -> None:
    pair = RecomputedNormAct(nn.BatchNorm2d(C))
    mine = nn.SyncBatchNorm.convert_sync_batchnorm(pair)  # type: ignore[no-untyped-call]
    with recompute(mine), pytest.raises(OptionError, match="SyncBatchNorm cannot be recomputed"):
        mine(torch.randn(N, C, H, W, requires_grad=True))


def test_no_activation_makes_the_norm_alone_recomputable() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(conv(), nn.BatchNorm2d(C), conv())
    mine = copy.deepcopy(plain)
    mine[1] = RecomputedNormAct(mine[1])
    x = torch.randn(N, C, H, W)
    assert_same_bits(run(mine, scope=True), run(plain))
    assert saved_bytes(lambda: _in_scope(mine, x), mine) == 2 * ACTIVATION_BYTES + 2 * C * 4


def test_pairs_are_found_in_sequences_and_counted() -> None:
    """Both orders; neither a norm alone, nor what is refused, nor the same activation twice."""
    model = nn.Sequential(
        nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.BatchNorm2d(C)),
        nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(C), nn.ReLU()),
        nn.Sequential(nn.SyncBatchNorm(C), nn.ReLU()),
        nn.ModuleList([nn.BatchNorm2d(C), nn.ReLU()]),
    )
    assert recompute_pairs(model) == 2
    assert [m.order for m in model.modules() if isinstance(m, RecomputedNormAct)] == list(ORDERS)
    assert recompute_pairs(nn.Sequential(conv())) == 0
    assert "ReLU runs with its norm" in repr(model)
    assert "order='act_norm'" in repr(model)


def test_an_activation_with_modules_of_its_own_is_not_taken_out_of_its_place() -> None:
    parent = nn.Sequential(nn.BatchNorm2d(C), nn.Sequential(nn.ReLU()))
    with pytest.raises(OptionError, match="give it to RecomputedNormAct by hand"):
        recompute_pair(parent, "0", "1")
