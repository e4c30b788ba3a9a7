"""The in-place norms against float64: the stated bound, at the extremes that break inversion too.

Shapes: x, z and their gradients (N, C, S); ``rows`` (statistics, values).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsave.in_place_abn import InPlaceABN, in_place_abn
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm, in_place_group_norm
from memsave.recomputed_norm_act import RecomputedNormAct
from tests.memsave.kept_bytes import saved_bytes
from tests.memsave.traced_bytes import traced_kept_bytes

N, C, S = 2, 4, 300
EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GROUPS = {"abn": None, "group": 2, "instance": C}


@dataclass(frozen=True)
class Extreme:
    """What is asked of a norm: slope of leaky ReLU, weight and bias, and its input."""

    slope: float = 0.01
    weight: float = 1.0
    bias: float = 0.0
    make: Callable[[], Tensor] = lambda: torch.randn(N, C, S)


def _with_constant_channel() -> Tensor:
    x = torch.randn(N, C, S)
    x[:, 1] = 7.3  # no number of any of the types
    return x


EXTREMES = {
    "slope 0.01": Extreme(),
    "slope 0.5 and a bias": Extreme(slope=0.5, bias=1.0),
    "scale 0.03": Extreme(weight=0.03),
    "scale 0.03 beside a bias": Extreme(weight=0.03, bias=-1.0),
    "scale 0": Extreme(weight=0.0),
    "scale 0 beside a bias": Extreme(weight=0.0, bias=1.0),
    "a negative scale": Extreme(weight=-1.3, bias=0.2),
    "a constant channel": Extreme(make=_with_constant_channel),
    "a constant channel beside a bias": Extreme(bias=-0.7, make=_with_constant_channel),
    "a huge mean": Extreme(make=lambda: torch.randn(N, C, S) * 30 + 4000),
}


def _rows(t: Tensor, groups: int | None) -> Tensor:
    return t.transpose(0, 1).reshape(C, -1) if groups is None else t.reshape(N * groups, -1)


def _back(rows: Tensor, groups: int | None) -> Tensor:
    return rows.reshape(C, N, S).transpose(0, 1) if groups is None else rows.reshape(N, C, S)


def _mean(t: Tensor, groups: int | None) -> Tensor:
    """Of each statistic, as large as ``t``."""
    rows = _rows(t, groups)
    return _back(rows.mean(1, keepdim=True).expand_as(rows), groups)


def _in_place(x: Tensor, groups: int | None, w: Tensor, b: Tensor, slope: float) -> Tensor:
    if groups is None:
        return in_place_abn(x, w, b, eps=EPS, activation_param=slope)
    return in_place_group_norm(x, groups, w, b, EPS, activation_param=slope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", GROUPS)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_values_and_gradients_are_within_the_stated_bound_of_float64(
    extreme: str, norm: str, dtype: torch.dtype
) -> None:
    """The docstring's bound of xhat, carried through to dx and to the parameters' gradients."""
    torch.manual_seed(0)
    case, groups = EXTREMES[extreme], GROUPS[norm]
    x, dz = case.make().to(dtype), torch.randn(N, C, S).to(dtype)
    weight, bias = torch.full((C,), case.weight), torch.full((C,), case.bias)
    weight.requires_grad_()
    bias.requires_grad_()
    leaf = x.clone().requires_grad_()
    z = _in_place(leaf * 1, groups, weight, bias, case.slope)
    values = z.detach().double().clone()
    torch.autograd.backward(z, dz)

    # The same in float64, from what x and dz are in their type.
    x, dz, g = x.double(), dz.double(), abs(torch.tensor(case.weight).double()) + EPS
    mean = _mean(x, groups)
    rstd = torch.rsqrt(_mean((x - mean).square(), groups) + EPS)
    xhat = (x - mean) * rstd
    y = g * xhat + case.bias
    dy = torch.where(y > 0, dz, dz * case.slope)
    share = _mean(g * dy * xhat, groups)
    dx = rstd * (g * dy - _mean(g * dy, groups) - xhat * share)

    unit, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    tiny *= torch.finfo(dtype).eps / 2  # half the spacing of numbers near 0
    inside = 8 * torch.finfo(torch.float32).eps  # a few roundings of float32, in which all is done
    statistics = inside * (1 + mean.abs() * rstd)  # of xhat, from mean and variance
    xhat_bound = 2 * unit * (xhat.abs() + abs(case.bias) / g) + tiny / case.slope / g + statistics
    # two roundings: of the norm's result and of the activation's, where they are two operators
    z_bound = 2 * unit * F.leaky_relu(y, case.slope).abs() + 2 * tiny
    z_bound = z_bound + g * (statistics + inside * xhat.abs()) + inside * abs(case.bias)
    assert (values - F.leaky_relu(y, case.slope)).abs().le(z_bound).all()

    # Where y is within its rounding of 0, either slope is right: dy may be off by itself there.
    near_zero = y.abs() <= xhat_bound * g
    dy_bound = torch.where(near_zero, dz.abs(), 0) + inside * dy.abs()
    term_bound = dy.abs() * xhat_bound + dy_bound * (xhat.abs() + xhat_bound)
    d_weight = (dy * xhat).sum((0, 2)) * (-1 if case.weight < 0 else 1)
    assert weight.grad is not None
    assert bias.grad is not None
    assert (weight.grad.double() - d_weight).abs().le(term_bound.sum((0, 2)) + 1e-6).all()
    assert (bias.grad.double() - dy.sum((0, 2))).abs().le(dy_bound.sum((0, 2)) + 1e-6).all()

    share_bound = _mean(g * term_bound, groups)
    inner = g * dy_bound + _mean(g * dy_bound, groups)
    inner = inner + xhat_bound * (share.abs() + share_bound) + xhat.abs() * share_bound
    inner = inner + inside * g * (dy.abs() + dy.abs().mean())
    dx_bound = rstd * inner * (1 + statistics) + (unit + statistics) * dx.abs() + tiny
    assert leaf.grad is not None
    assert (leaf.grad.double() - dx).abs().le(dx_bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_in_place_cannot_hold_the_lossless_twin_does(dtype: torch.dtype) -> None:
    """A scale near 0 beside a bias: z has rounded xhat away, and the weight's gradient with it."""
    torch.manual_seed(0)
    x, dz = torch.randn(1, C, S).to(dtype), torch.randn(1, C, S).to(dtype)
    layers: dict[str, nn.Module] = {"in place": InPlaceABN(C)}
    plain, norm = nn.BatchNorm1d(C), nn.BatchNorm1d(C)
    layers["twin"] = RecomputedNormAct(norm, nn.LeakyReLU(0.01))
    layers["plain"] = nn.Sequential(plain, nn.LeakyReLU(0.01))
    grads = {}
    for name, layer in layers.items():
        weight, bias = layer.parameters()
        nn.init.constant_(weight, 1e-4)
        nn.init.ones_(bias)
        torch.autograd.backward(layer(x.clone().requires_grad_() * 1), dz)
        grads[name] = weight.grad
    assert grads["plain"] is not None
    assert grads["in place"] is not None
    assert torch.equal(grads["twin"], grads["plain"])  # type: ignore[arg-type]
    error = (grads["in place"] - grads["plain"]).abs() / grads["plain"].abs()
    assert error.max() > 0.5  # u |bias| / g is 5 in float16, and 40 in bfloat16


# What each keeps besides z: 1/std of each statistic, in float32 or float64.
KEPT: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "abn": (lambda: InPlaceABN(C), C),
    "group": (lambda: InPlaceGroupNorm(2, C), N * 2),
    "instance": (lambda: InPlaceInstanceNorm(C, affine=True), N * C),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("norm", KEPT)
def test_bytes_kept_follow_from_shapes_and_the_tracer_sees_the_same(
    norm: str, dtype: torch.dtype
) -> None:
    """z of (N, C, S), which takes x's place, and 1/std: the tracer counts what is new."""
    make, statistics = KEPT[norm]
    expected = statistics * (8 if dtype == torch.float64 else 4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def prepare() -> Callable[[], object]:
        torch.set_default_dtype(wide)  # fake parameters cannot be converted
        layer = make()
        torch.set_default_dtype(torch.float32)
        x = torch.randn(N, C, S, dtype=dtype, requires_grad=True) * 1
        return lambda: layer(x)

    layer = make().to(wide)
    x = torch.randn(N, C, S, dtype=dtype, requires_grad=True)
    assert saved_bytes(lambda: layer(x * 1), layer) == N * C * S * dtype.itemsize + expected
    # evaluation's running statistics and weights live anyway; forward's buffer is 0 bytes here
    assert traced_kept_bytes(prepare) == expected
