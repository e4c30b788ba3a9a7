"""Mixed precision as one object, on the CPU's autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memsave.errors import OptionError, UnknownNameError
from memsave.mixed_precision import MixedPrecision, Precision
from memsave.networks import FCN

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


def test_fp16_skips_a_step_that_overflowed_and_halves_the_scale() -> None:
    scope = MixedPrecision("fp16", "cpu")
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scope.backward(weight.sum() * torch.inf)
    scope.step(optimizer)
    assert torch.equal(weight.detach(), torch.zeros(3))
    assert scope.state_dict()["scale"] == 32768.0


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
