"""The checks of the in-place norms catch variants that are broken on purpose.

Each check passes on the code as it is, and fails once the fault it is there for is put in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memsave import in_place_abn_maths, in_place_backward_maths, in_place_norm
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.in_place_norm_ops import overwrite_with_gradient, overwrite_with_norm
from tests.memsave.kept_bytes import LiveBytes, saved_bytes
from tests.memsave.norm_formulas import plain_norm

N, C, S = 2, 6, 50
Check = Callable[[], None]
Fault = Callable[[pytest.MonkeyPatch], None]
LAYERS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "abn": (lambda: InPlaceABN(C), None),
    "group": (lambda: InPlaceGroupNorm(2, C), 2),
    "instance": (lambda: InPlaceInstanceNorm(C, affine=True), C),
}


def check_gradients() -> None:
    """Of x, weight (of both signs) and bias: the formulas', in float64, to its rounding."""
    for make, groups in LAYERS.values():
        torch.manual_seed(0)
        layer = make().double()
        weight, bias = layer.parameters()
        nn.init.normal_(weight)
        nn.init.normal_(bias)
        x = torch.randn(N, C, S, dtype=torch.float64, requires_grad=True)
        dz = torch.randn(N, C, S, dtype=torch.float64)
        plain = plain_norm(x, groups, weight, bias, 1e-5, "leaky_relu", 0.01)
        expected = torch.autograd.grad(plain, (x, weight, bias), dz)
        actual = torch.autograd.grad(layer(x * 1), (x, weight, bias), dz)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def check_the_callers_gradient() -> None:
    """A sum hands one tensor to both branches: the skip's gradient is dz as it was given."""
    for make, _ in LAYERS.values():
        layer = make()
        skip = torch.randn(N, C, S, requires_grad=True)
        dz = torch.randn(N, C, S)
        given = dz.clone()
        x = torch.randn(N, C, S, requires_grad=True)
        torch.autograd.backward(layer(x * 1) + skip, dz)
        assert torch.equal(dz, given)
        assert torch.equal(skip.grad, given)  # type: ignore[arg-type]


def check_running_statistics() -> None:
    """One step of BatchNorm's from 0 and 1, with the unbiased variance."""
    torch.manual_seed(0)
    abn, norm, x = InPlaceABN(C), nn.BatchNorm1d(C), torch.randn(N, C, S) * 2 + 1
    norm(x)
    abn(x.clone().requires_grad_() * 1).sum().backward()
    torch.testing.assert_close(abn.running_mean, norm.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(abn.running_var, norm.running_var, rtol=1e-6, atol=0)
    assert abn.num_batches_tracked == 1


def check_temporaries() -> None:
    """An eighth of the activation in backward, beside numbers of a channel."""
    channels = 64
    z = torch.randn(1, channels, 2000)
    dz, ones = torch.ones_like(z), torch.ones(channels)
    with LiveBytes() as live:
        in_place_backward_maths.backward_(z, dz, ones, ones, ones, True, "leaky_relu", 0.01)
    assert 0 <= live.peak_bytes - z.nbytes // 8 < channels * 8 * 8


def check_bytes_kept() -> None:
    """z, in x's own storage, and 1/std: nothing else of any size."""
    for make, groups in LAYERS.values():
        layer, x = make(), torch.randn(N, C, S, requires_grad=True)
        statistics = C if groups is None else N * groups
        assert saved_bytes(lambda m=layer, y=x: m(y * 1), layer) == N * C * S * 4 + statistics * 4  # type: ignore[misc]


def _sign_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient as if the scale were the weight and not its absolute value."""

    def broken(z: Tensor, dz: Tensor, weight: Tensor | None, *rest: Any) -> Any:
        d_weight, d_bias = overwrite_with_gradient(z, dz, weight, *rest)
        return d_weight if weight is None else d_weight * weight.sign(), d_bias

    monkeypatch.setattr(in_place_norm, "overwrite_with_gradient", broken)


def _written_over_dz(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(z: Tensor, dz: Tensor, *rest: Any) -> Any:
        results = overwrite_with_gradient(z, dz, *rest)
        dz.copy_(z)
        return results

    monkeypatch.setattr(in_place_norm, "overwrite_with_gradient", broken)


def _statistics_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor, *rest: Any) -> Any:
        overwrite_with_norm(x.clone(), *rest)
        return overwrite_with_norm(x, *rest)

    monkeypatch.setattr(in_place_norm, "overwrite_with_norm", broken)


def _one_temporary_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    sound: Any = in_place_backward_maths._gradient_sums

    def broken(y: Tensor, *rest: Any) -> Any:
        copy = y.clone()
        return sound(copy, *rest)

    monkeypatch.setattr(in_place_backward_maths, "_gradient_sums", broken)


def _channels_not_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place_backward_maths, "channels_at_once", lambda z: z.shape[1])


def _mean_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """dx without the share of the batch's statistics, as in evaluation."""
    sound: Any = in_place_backward_maths.coefficients

    def broken(*arguments: Any) -> Any:
        return sound(*arguments[:5], False)

    monkeypatch.setattr(in_place_backward_maths, "coefficients", broken)


def _not_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """xhat read off z as if there were no activation."""
    monkeypatch.setattr(in_place_backward_maths, "invert_", lambda *_: None)


def _slope_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place_backward_maths, "_activation_backward", lambda dz, *_: dz)


def _input_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of x stays for backward, beside 1/std, as the plain norm keeps it."""

    def broken(x: Tensor, *rest: Any) -> Any:
        copy = x.flatten().clone()
        rstd = overwrite_with_norm(x, *rest)
        return torch.cat([rstd, copy])[: rstd.numel()]

    monkeypatch.setattr(in_place_norm, "overwrite_with_norm", broken)


FAULTS: dict[Fault, Check] = {
    _sign_forgotten: check_gradients,
    _mean_left_out: check_gradients,
    _not_inverted: check_gradients,
    _slope_left_out: check_gradients,
    _written_over_dz: check_the_callers_gradient,
    _statistics_twice: check_running_statistics,
    _one_temporary_too_many: check_temporaries,
    _channels_not_in_parts: check_temporaries,
    _input_kept: check_bytes_kept,
}


CHECKS = list(dict.fromkeys(FAULTS.values()))


def _name(function: Any) -> str:
    return str(function.__name__).strip("_")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place_abn_maths, "SMALL_ELEMENTS", 0)


@pytest.mark.parametrize("check", CHECKS, ids=_name)
def test_the_code_as_it_is_passes(check: Check) -> None:
    check()


@pytest.mark.parametrize("fault", FAULTS, ids=_name)
def test_a_broken_variant_is_caught(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        FAULTS[fault]()
