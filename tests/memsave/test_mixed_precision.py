"""Mixed precision as one object, on the CPU's autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.build_workload import build_workload
from bench.case import Case
from memsave.errors import OptionError, UnknownNameError
from memsave.mixed_precision import MixedPrecision, Precision
from memsave.networks import FCN
from tests.memsave.traced_bytes import traced_kept_bytes

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@pytest.mark.parametrize("precision", DTYPES)
def test_activations_have_its_type_and_weights_stay_float32(precision: Precision) -> None:
    scope = MixedPrecision(precision, "cpu")
    linear = nn.Linear(4, 4)
    with scope.forward():
        result = linear(torch.randn(2, 4))
    assert result.dtype == DTYPES[precision]
    assert linear.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", DTYPES)
def test_a_step_is_the_optimizers_on_unscaled_gradients(precision: Precision) -> None:
    """SGD on sum(w), of gradient 1: w - lr in every precision, whatever the loss scale."""
    scope = MixedPrecision(precision, "cpu")
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scope.backward(weight.sum())
    scaled = 65536.0 if precision == "fp16" else 1.0  # GradScaler's first scale
    assert torch.equal(weight.grad, torch.full((3,), scaled))  # type: ignore[arg-type]
    scope.step(optimizer)
    assert torch.equal(weight.detach(), torch.full((3,), -0.5))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all weights and of all tensors in the optimizer's state."""
    kept = [t for entry in optimizer.state.values() for t in entry.values()]
    return [t.detach().clone() for t in [*model.parameters(), *kept]]


def _train(scope: MixedPrecision, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    with scope.forward():
        loss = model(torch.ones(2, 4)).square().mean()
    scope.backward(loss)
    scope.step(optimizer)


def test_fp16_skips_a_step_that_overflowed_and_halves_the_scale() -> None:
    """The loss is finite; its gradients in half precision, at a scale of 2^30, are not."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scope = MixedPrecision("fp16", "cpu", initial_scale=1024.0)
    _train(scope, model, optimizer)
    before = _state(model, optimizer)
    assert len(before) == 2 + 2 * 3  # weight and bias; for each Adam's step and two averages
    scope.load_state_dict({**scope.state_dict(), "scale": 2.0**30})

    _train(scope, model, optimizer)

    assert model.weight.grad is not None
    assert not torch.isfinite(model.weight.grad).all()
    assert all(map(torch.equal, before, _state(model, optimizer)))
    assert scope.state_dict()["scale"] == 2.0**29
    for _ in range(29):  # it finds its way back
        _train(scope, model, optimizer)
    assert not any(map(torch.equal, before, _state(model, optimizer)))


def test_the_scale_doubles_after_so_many_good_steps_in_a_row() -> None:
    """Three; an overflow in between starts the count again."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scope = MixedPrecision("fp16", "cpu", initial_scale=8.0, growth_interval=3)
    scales = []
    for overflows in (False, False, True, False, False, False, False):
        if overflows:
            scope.backward(model(torch.ones(2, 4)).sum() * torch.inf)
            scope.step(optimizer)
        else:
            _train(scope, model, optimizer)
        scales.append(scope.state_dict()["scale"])
    assert scales == [8, 8, 4, 4, 4, 8, 8]


@pytest.mark.parametrize("precision", DTYPES)
def test_gradients_are_clipped_after_the_scale_is_taken_off(precision: Precision) -> None:
    """Of norm 5, to norm 1: w - lr * gradient / 5, whatever the loss scale; a scale comes off once.

    clip_grad_norm_ divides by norm + 1e-6.
    """
    scope = MixedPrecision(precision, "cpu")
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scope.backward((weight * torch.tensor([3.0, 4.0])).sum())
    scope.unscale(optimizer)
    assert torch.equal(weight.grad, torch.tensor([3.0, 4.0]))  # type: ignore[arg-type]
    nn.utils.clip_grad_norm_([weight], 1.0)
    scope.step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_kept_bytes_are_half_activations_and_half_copies_of_weights(precision: Precision) -> None:
    """In float32: the activation between, and the result; image and weights live anyway.

    In half: these in 2 bytes; the image's and the weights' copies. Biases' copies die with the
    scope, in which they count too.
    """
    image_bytes, between_bytes, result_bytes = 2 * 2 * 9**3, 2 * 2 * 4 * 7**3, 2 * 2 * 3 * 7**3
    weights_bytes, biases_bytes = 2 * (4 * 27 + 3 * 4), 2 * (4 + 3)

    def prepare(scope: MixedPrecision, inside: bool = False) -> Callable[[], object]:
        model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 3, 1))
        image, around = torch.randn(2, 1, 9, 9, 9), scope.forward()

        def forward() -> object:
            around.__enter__()
            result = model(image)
            if inside:
                leaving.callback(around.__exit__, None, None, None)
            else:
                around.__exit__(None, None, None)
            return result

        return forward

    half, plain = MixedPrecision(precision, "cpu"), MixedPrecision("fp32", "cpu")
    kept_bytes = image_bytes + weights_bytes + between_bytes + result_bytes
    assert traced_kept_bytes(lambda: prepare(half)) == kept_bytes
    with ExitStack() as leaving:
        assert traced_kept_bytes(lambda: prepare(half, True)) == kept_bytes + biases_bytes
    assert traced_kept_bytes(lambda: prepare(plain)) == 2 * (between_bytes + result_bytes)


def test_the_workloads_of_suites_use_the_same_scope() -> None:
    case = Case(
        network="fcn", variant="v", requested_shape=(8, 8, 8), shape=(8, 8, 8),
        network_options={"widths": [4, 8]}, precision="bf16",
    )  # fmt: skip
    workload = build_workload(case, lambda _: None, "cpu")
    assert type(workload.precision) is MixedPrecision
    types: list[torch.dtype] = []
    workload.model.register_forward_hook(lambda _m, _i, result: types.append(result.dtype))
    workload.step(lambda _: None)
    assert types == [torch.bfloat16]
    assert {p.dtype for p in workload.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("options", [{"initial_scale": 0.0}, {"growth_interval": 0}], ids=str)
def test_a_scale_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"initial_scale must be more than 0 and growth_interval"):
        MixedPrecision("fp16", "cpu", **options)


def test_the_loss_scale_is_carried_over() -> None:
    first, second = MixedPrecision("fp16", "cpu"), MixedPrecision("fp16", "cpu")
    state = {**first.state_dict(), "scale": 1024.0}
    second.load_state_dict(state)
    assert second.state_dict()["scale"] == 1024.0
    plain = MixedPrecision("bf16", "cpu")
    assert plain.state_dict() == {}
    plain.load_state_dict({})


@pytest.mark.parametrize(("saved", "loading"), [("fp16", "fp32"), ("bf16", "fp16")])
def test_a_state_of_another_precision_is_refused(saved: Precision, loading: Precision) -> None:
    state = MixedPrecision(saved, "cpu").state_dict()
    with pytest.raises(OptionError, match=f"the precision here is {loading}"):
        MixedPrecision(loading, "cpu").load_state_dict(state)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown precision 'float16' .*'fp16'"):
        MixedPrecision("float16")  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_cuda_where_there_is_none_is_refused(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would warn and compute in fp32."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: True)
    with pytest.raises(OptionError, match="needs autocast on 'cuda', which is not available"):
        MixedPrecision(precision, "cuda")
    MixedPrecision("fp32", "cuda")


def test_a_device_without_autocast_is_refused() -> None:
    with pytest.raises(OptionError, match="needs autocast on 'meta'"):
        MixedPrecision("bf16", "meta")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
def test_the_fcn_trains_in_mixed_precision(norm: str, precision: Precision) -> None:
    """Twenty steps lower the loss by half; statistics and gradients are float32."""
    torch.manual_seed(0)
    model = FCN(widths=(8, 16), block="ccblock", norm=norm)
    scope = MixedPrecision(precision, "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    image = torch.randn(1, 1, 4, 8, 6)
    target = (image[:, 0] > 0).long()
    losses: list[Tensor] = []
    for _ in range(20):
        optimizer.zero_grad()
        with scope.forward():
            logits = model(image)
            loss = nn.functional.cross_entropy(logits, target)
        scope.backward(loss)
        scope.step(optimizer)
        losses.append(loss.detach())
    assert logits.dtype == DTYPES[precision]
    assert losses[-1] < losses[0] / 2
    kept = [*(p.grad for p in model.parameters()), *model.parameters(), *model.buffers()]
    assert {t.dtype for t in kept if t is not None} == {torch.float32, torch.int64}
