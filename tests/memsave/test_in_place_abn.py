"""In-place ABN computes what BatchNorm and the activation compute, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsave.in_place_abn import Activation, InPlaceABN, in_place_abn
from memsave.in_place_abn_maths import invert_

ACTIVATIONS: dict[Activation, tuple[float, Callable[[Tensor], Tensor]]] = {
    "leaky_relu": (0.01, lambda y: F.leaky_relu(y, 0.01)),
    "elu": (1.5, lambda y: F.elu(y, 1.5)),
    "identity": (0.01, lambda y: y),
}
SHAPES = [(6, 3), (4, 3, 5), (2, 3, 4, 3), (2, 3, 2, 4, 3), (1, 3, 5, 2, 3)]
HALVES = [torch.float16, torch.bfloat16]


def _norms(
    activation: Activation, channels: int, dtype: torch.dtype = torch.float64
) -> tuple[InPlaceABN, nn.BatchNorm1d]:
    """An in-place ABN and the BatchNorm that equals it, with weights of both signs."""
    torch.manual_seed(0)
    abn = InPlaceABN(channels, activation=activation, activation_param=ACTIVATIONS[activation][0])
    nn.init.uniform_(abn.weight, 0.5, 1.5)
    nn.init.normal_(abn.bias)
    with torch.no_grad():
        abn.weight[0] *= -1
    abn, norm = abn.to(dtype), nn.BatchNorm1d(channels).to(dtype)
    norm.load_state_dict(abn.state_dict())
    with torch.no_grad():
        norm.weight.copy_(abn.weight.abs() + abn.eps)
    return abn, norm


def _plain(norm: nn.BatchNorm1d, activation: Activation, x: Tensor) -> Tensor:
    """BatchNorm and activation, on any number of sides."""
    return ACTIVATIONS[activation][1](norm(x.flatten(2) if x.dim() > 2 else x)).view(x.shape)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck_in_float64(
    shape: tuple[int, ...], activation: Activation, training: bool
) -> None:
    torch.manual_seed(1)
    abn, _ = _norms(activation, shape[1])
    x, weight, bias = torch.randn(shape, dtype=torch.float64), abn.weight, abn.bias
    mean, var = torch.rand(shape[1]).double(), torch.rand(shape[1]).double() + 0.5

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # gradcheck runs it again and again: statistics are copies, x no leaf.
        return in_place_abn(
            x.clone(),
            weight,
            bias,
            mean.clone(),
            var.clone(),
            training=training,
            activation=activation,
            activation_param=abn.activation_param,
        )

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), weight, bias))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients_equal_batch_norm_and_activation(
    shape: tuple[int, ...], activation: Activation, training: bool
) -> None:
    abn, norm = _norms(activation, shape[1])
    abn.train(training)
    norm.train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dz = torch.randn(shape, dtype=torch.float64)

    expected = _plain(norm, activation, x)
    expected_grads = torch.autograd.grad(expected, (x, norm.weight, norm.bias), dz)
    actual = abn(x.clone())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)
    actual_grads = torch.autograd.grad(actual, (x, abn.weight, abn.bias), dz)

    sign = torch.ones_like(abn.weight)
    sign[0] = -1  # the weight that is negative acts as its absolute value
    expected_grads = (expected_grads[0], expected_grads[1] * sign, expected_grads[2])
    # Inverting costs a few roundings of 1e-16, of sums of up to 30 terms of order 1.
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(abn.running_mean, norm.running_mean, rtol=0, atol=1e-16)
    torch.testing.assert_close(abn.running_var, norm.running_var, rtol=0, atol=1e-16)
    assert abn.num_batches_tracked == norm.num_batches_tracked == int(training)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_result_is_batch_norms_bit_for_bit(dtype: torch.dtype) -> None:
    """In each type, with statistics and weights in float32, as under autocast."""
    abn, norm = _norms("leaky_relu", 5, torch.float32)
    x = torch.randn(3, 5, 7, 6).mul_(3).add_(1).to(dtype)
    expected = F.leaky_relu(norm(x.flatten(2)).view(x.shape), 0.01)
    actual = abn(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert abn.running_mean is not None
    assert norm.running_mean is not None
    torch.testing.assert_close(abn.running_mean, norm.running_mean, rtol=0, atol=0)
    assert abn.running_mean.dtype == torch.float32


def _exact(
    x: Tensor, scale: Tensor, shift: Tensor, slope: float, dz: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """xhat, 1/std, dy, dx and d_scale in float64, by the formulas, of x (1, C, n)."""
    x, scale, shift, dz = x.double(), scale.double(), shift.double(), dz.double()
    rstd = torch.rsqrt(x.var((0, 2), correction=0) + 1e-5)[:, None]
    xhat = (x - x.mean((0, 2), keepdim=True)) * rstd
    y = xhat * scale[:, None] + shift[:, None]
    dy = torch.where(y > 0, dz, dz * slope)
    shares = dy.mean((0, 2), keepdim=True), (dy * xhat).mean((0, 2), keepdim=True)
    dx = scale[:, None] * rstd * (dy - shares[0] - xhat * shares[1])
    return xhat, rstd, dy, dx, (dy * xhat).sum((0, 2))


@pytest.mark.parametrize("scale", [1.0, 0.03, 0.0], ids="weight {}".format)
@pytest.mark.parametrize("shift", [0.0, 1.0], ids="bias {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradients_are_within_the_stated_bound_of_float64(
    dtype: torch.dtype, shift: float, scale: float
) -> None:
    """The docstring's bound of xhat, carried through to dx and the weight's gradient."""
    torch.manual_seed(0)
    channels, count, slope, eps = 4, 600, 0.01, 1e-5
    x = torch.randn(1, channels, count).to(dtype)
    dz = torch.randn(1, channels, count).to(dtype)
    weight = torch.full((channels,), scale, requires_grad=True)
    bias = torch.full((channels,), shift)
    g = weight.detach() + eps
    xhat, rstd, dy, dx, d_scale = _exact(x, g, bias, slope, dz)

    leaf = x.clone().requires_grad_()
    z = in_place_abn(leaf.clone(), weight, bias)
    torch.autograd.backward(z, dz)

    unit = torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2  # spacing near zero
    xhat_bound = 2 * unit * (xhat.abs() + shift / g[:, None]) + tiny / slope / g[:, None]
    # Where y is within its rounding of 0, either slope is right: dy may be off by itself there.
    near_zero = (xhat * g[:, None] + shift).abs() <= xhat_bound * g[:, None]
    dy_bound = torch.where(near_zero, dz.double().abs(), 0)
    # float32 inside: a few roundings of each term, and the sums' own.
    inside = 8 * torch.finfo(torch.float32).eps
    term_bound = dy.abs() * xhat_bound + dy_bound * xhat.abs() + inside * (dy * xhat).abs()
    total = term_bound.sum((0, 2))
    assert leaf.grad is not None
    assert weight.grad is not None
    assert (weight.grad.double() - d_scale).abs().le(total + 1e-6).all()

    share, share_bound = (dy * xhat).mean((0, 2), keepdim=True).abs(), total[:, None] / count
    inner = dy_bound + dy_bound.mean((0, 2), keepdim=True) + xhat_bound * (share + share_bound)
    inner = inner + xhat.abs() * share_bound + inside * (dy.abs() + 1)
    dx_bound = g[:, None] * rstd * inner + unit * dx.abs() + tiny
    assert (leaf.grad.double() - dx).abs().le(dx_bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_elu_is_inverted_down_to_where_its_slope_is_one_rounding(dtype: torch.dtype) -> None:
    """Below about log(u) nothing is left; above, u of z is u / slope = u exp(-y) of y."""
    unit = torch.finfo(dtype).eps / 2
    y = torch.linspace(math.log(2 * unit), 3, 500, dtype=torch.float64).to(dtype)
    z = F.elu(y)
    invert_(z, "elu", 1.0)
    bound = 2 * unit * (y.double().neg().exp().clamp(min=1) + y.double().abs())
    assert (z.double() - y.double()).abs().le(bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_elu_far_below_zero_has_finite_gradients(dtype: torch.dtype) -> None:
    """ELU rounds to -alpha there, whose inverse would be minus infinity."""
    x = torch.randn(1, 2, 500).to(dtype)
    leaf = x.clone().requires_grad_()
    bias = torch.tensor([-100.0, 0.0])
    z = in_place_abn(leaf.clone(), None, bias, activation="elu", activation_param=1.0)
    assert (z[:, 0] == -1).all()
    torch.autograd.backward(z.sum())
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[:, 0] == 0).all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_memory_layout_gives_the_same(layout: str, dtype: torch.dtype) -> None:
    abn, _ = _norms("leaky_relu", 20, torch.float32)
    values = torch.randn(2, 20, 5, 5).to(dtype)
    plain, other = values.clone().requires_grad_(), values.clone().requires_grad_()

    x = LAYOUTS[layout](other * 1)
    assert not x.is_contiguous()
    actual = abn(x)
    expected = abn(LAYOUTS[layout](plain * 1).contiguous())
    # Sums run in another order: float32 roundings, or one of the result's type.
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)
    dz = torch.randn(2, 20, 5, 5).to(dtype)
    actual.backward(dz)
    expected.backward(dz)
    torch.testing.assert_close(other.grad, plain.grad, rtol=bound, atol=bound)


def test_gradient_of_part_of_a_tensor_reaches_the_whole() -> None:
    """A view as input: the rest of the tensor keeps its values and its gradient."""
    abn, norm = _norms("leaky_relu", 3)
    x = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    y = x * 1
    actual = torch.autograd.grad(abn(y[:, :3]).square().sum() + y[:, 3:].sum(), x)
    loss = _plain(norm, "leaky_relu", x[:, :3]).square().sum() + x[:, 3:].sum()
    expected = torch.autograd.grad(loss, x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_callers_gradient_is_never_written_to(activation: Activation) -> None:
    """A sum hands one gradient tensor to both branches; the skip's must come through whole."""
    abn, _ = _norms(activation, 3)
    skip = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    dz = torch.randn(2, 3, 8, dtype=torch.float64)
    given = dz.clone()
    (abn(x * 1) + skip).backward(dz)
    assert torch.equal(dz, given)
    assert skip.grad is not None
    assert torch.equal(skip.grad, given)


def test_gradient_carries_no_history() -> None:
    """It is z's storage, but a hook that keeps it must not keep the graph that made z."""
    seen: list[Tensor] = []
    x = torch.randn(2, 3, 8, requires_grad=True) * 1
    x.register_hook(seen.append)  # type: ignore[no-untyped-call]
    torch.autograd.backward(InPlaceABN(3)(x).sum())
    assert [gradient.requires_grad for gradient in seen] == [False]


def test_without_weights_or_running_statistics() -> None:
    """Evaluation then uses the batch's statistics too, as BatchNorm does."""
    abn = InPlaceABN(3, affine=False, track_running_stats=False).eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    expected = F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.01)
    actual = abn(x.clone())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)
    expected_grad = torch.autograd.grad(expected.square().sum(), x)
    actual_grad = torch.autograd.grad(actual.square().sum(), x)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-12, atol=1e-13)
    assert list(abn.state_dict()) == []


def test_momentum_none_is_the_plain_average() -> None:
    abn, norm = InPlaceABN(3, momentum=None), nn.BatchNorm1d(3, momentum=None)
    for _ in range(3):
        x = torch.randn(4, 3, 5)
        norm(x)
        abn(x)
    torch.testing.assert_close(abn.running_mean, norm.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(abn.running_var, norm.running_var, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_model_that_is_half_throughout(dtype: torch.dtype) -> None:
    """Buffers and weights in half precision too: computed in float32, stored in theirs."""
    abn, norm = InPlaceABN(3).to(dtype), nn.BatchNorm1d(3).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(abn.weight.abs() + abn.eps)
    x = torch.randn(4, 3, 50).to(dtype)
    x.requires_grad_()
    abn(x.clone()).sum().backward()
    norm(x)
    assert abn.weight.grad is not None
    assert abn.weight.grad.dtype == dtype
    assert abn.running_mean is not None
    assert norm.running_mean is not None
    assert abn.running_mean.dtype == dtype
    bound = torch.finfo(dtype).eps / 2  # one rounding to the buffer's type
    torch.testing.assert_close(abn.running_mean, norm.running_mean, rtol=bound, atol=bound / 10)
    before = abn.running_mean.clone()
    abn.eval()(x.detach().clone())
    assert torch.equal(abn.running_mean, before)


def test_state_dicts_load_both_ways() -> None:
    abn, norm = InPlaceABN(3), nn.BatchNorm3d(3)
    norm(torch.randn(2, 3, 2, 2, 2))
    abn.load_state_dict(norm.state_dict())
    assert abn.num_batches_tracked == 1
    assert torch.equal(abn.running_mean, norm.running_mean)  # type: ignore[arg-type]
    nn.BatchNorm3d(3).load_state_dict(abn.state_dict())
    assert list(abn.state_dict()) == list(norm.state_dict())


def test_a_state_dict_without_the_batch_count_loads() -> None:
    """The reference implementation has no such buffer; its files say version 1 or nothing."""
    state = {k: v for k, v in InPlaceABN(3).state_dict().items() if k != "num_batches_tracked"}
    state["running_mean"] = torch.ones(3)
    abn = InPlaceABN(3)
    abn.load_state_dict(state)
    assert torch.equal(abn.running_mean, torch.ones(3))  # type: ignore[arg-type]


def test_repr_names_the_activation() -> None:
    assert "activation=elu[1.5]" in repr(InPlaceABN(3, activation="elu", activation_param=1.5))
