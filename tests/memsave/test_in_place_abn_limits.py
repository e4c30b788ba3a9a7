"""In-place ABN: bytes, and what it refuses or autograd refuses for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.errors import InputError, OptionError, UnknownNameError
from memsave.in_place_abn import InPlaceABN, in_place_abn
from memsave.in_place_abn_maths import (
    SMALL_ELEMENTS,
    activate_,
    backward_,
    compute_dtype,
    normalise_,
    scale_and_shift,
)
from tests.memsave.kept_bytes import LiveBytes, saved_bytes

N, C, D, H, W = 2, 6, 3, 5, 4
SIZES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.float64: 8}


@pytest.mark.parametrize("dtype", SIZES, ids=str)
def test_only_z_and_one_number_a_channel_are_kept(dtype: torch.dtype) -> None:
    """z of (N, C, D, H, W) and 1/std of (C,), in float32 beside half; weights live anyway."""
    statistic = 8 if dtype == torch.float64 else 4
    abn = InPlaceABN(C)
    x = torch.randn(N, C, D, H, W).to(dtype).requires_grad_()
    kept = saved_bytes(lambda: abn(x.clone()), abn)
    assert kept == N * C * D * H * W * SIZES[dtype] + C * statistic


def test_conv_chain_keeps_one_activation_fewer_than_batch_norm_and_leaky_relu() -> None:
    """conv -> norm -> act -> conv: x goes, and BatchNorm's mean, which we do not need."""
    conv_a, conv_b = nn.Conv3d(1, C, 1), nn.Conv3d(C, C, 1)
    x = torch.randn(N, 1, D, H, W)
    plain = nn.Sequential(conv_a, nn.BatchNorm3d(C), nn.LeakyReLU(0.01, inplace=True), conv_b)
    in_place = nn.Sequential(conv_a, InPlaceABN(C), conv_b)
    difference = saved_bytes(lambda: plain(x), plain) - saved_bytes(lambda: in_place(x), in_place)
    assert difference == N * C * D * H * W * 4 + C * 4


def _peak_of_plain_backward(z: Tensor) -> int:
    """Bytes on top of z and dz; the operator would hide what happens inside of it."""
    dz, numbers = torch.ones_like(z), torch.ones(64, dtype=compute_dtype(z))
    with LiveBytes() as live:
        backward_(z, dz, numbers, numbers, numbers, True, "leaky_relu", 0.01)
    peak: int = live.peak_bytes
    return peak


@pytest.mark.parametrize(
    ("dtype", "temporaries"), [(torch.float32, 2), (torch.float16, 3), (torch.float64, 2)], ids=str
)
def test_plain_backward_needs_eighths_of_the_activation(
    dtype: torch.dtype, temporaries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient takes z's place, so only temporaries of ``nbytes / 8`` come on top."""
    monkeypatch.setattr("memsave.in_place_abn_maths.SMALL_ELEMENTS", 0)
    z = torch.randn(1, 64, 5000).to(dtype)
    # Of a channel: the sums, and a handful of numbers for the part at hand.
    assert 0 <= _peak_of_plain_backward(z) - temporaries * z.nbytes // 8 < 64 * 8 * 8


def test_plain_backward_takes_channels_last_sixteen_channels_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 64: two temporaries of a quarter, where an eighth would read memory by halves."""
    monkeypatch.setattr("memsave.in_place_abn_maths.SMALL_ELEMENTS", 0)
    z = torch.randn(1, 64, 50, 100).to(memory_format=torch.channels_last)
    assert 0 <= _peak_of_plain_backward(z) - 2 * z.nbytes // 4 < 64 * 4 * 8


def test_plain_backward_takes_a_small_activation_in_one_piece() -> None:
    """Up to 2**20 elements: two temporaries as large as it is."""
    z = torch.randn(1, 64, SMALL_ELEMENTS // 64)
    assert 0 <= _peak_of_plain_backward(z) - 2 * z.nbytes < 64 * 4 * 8


def test_backward_gives_out_the_parameters_gradients_alone() -> None:
    """Two numbers a channel on the CPU: no buffer of the kernels, no activation."""
    x = torch.randn(1, 64, 5000, requires_grad=True)
    abn = InPlaceABN(64)
    z = abn(x.clone())
    dz = torch.ones_like(z)
    with LiveBytes() as live:
        torch.autograd.backward(z, dz, inputs=[abn.weight])
    assert live.peak_bytes == 2 * 64 * 4


def test_forward_has_no_temporary() -> None:
    """Plain maths, of C = 64 channels only: |weight| and scale, shift, mean, 1/std."""
    x, weight, bias = torch.randn(1, 64, 5000), torch.ones(64), torch.zeros(64)
    with LiveBytes() as live:
        scale, shift = scale_and_shift(x, weight, bias, 1e-5)
        normalise_(x, scale, shift, None, None, True, 0.1, 1e-5)
        activate_(x, "leaky_relu", 0.01)
    assert 0 < live.peak_bytes <= 64 * 4 * 5


def test_forward_is_one_operator_that_makes_one_number_a_channel() -> None:
    x, abn = torch.randn(1, 64, 5000), InPlaceABN(64)
    with LiveBytes() as live, torch.no_grad():
        z = abn(x)
    assert z.data_ptr() == x.data_ptr()
    assert live.peak_bytes == 64 * 4


def test_the_input_is_overwritten_and_returned() -> None:
    x = torch.randn(2, 3, 4)
    assert InPlaceABN(3)(x) is x


def test_a_leaf_that_requires_grad_is_refused() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(InputError, match=r"leaf that requires grad.*x\.clone\(\)"):
        InPlaceABN(3)(x)
    assert torch.equal(x, before)
    with torch.no_grad():
        InPlaceABN(3)(x)  # nothing to differentiate, so nothing to refuse


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_an_input_that_is_not_floating_point_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"floating-point input, got {dtype}"):
        InPlaceABN(3)(torch.ones(2, 3, 4, dtype=dtype))


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(InputError, match=r"3 channels \(weight\), got an input with 4"):
        InPlaceABN(3)(torch.randn(2, 4, 5))
    with pytest.raises(InputError, match=r"3 channels \(running_mean\), got an input with 4"):
        InPlaceABN(3, affine=False)(torch.randn(2, 4, 5))
    with pytest.raises(InputError, match=r"\(N, C, \*\), got shape \(4,\)"):
        in_place_abn(torch.randn(4))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1, 1), (0, 3, 4)], ids=str)
def test_one_value_a_channel_cannot_train(shape: tuple[int, ...]) -> None:
    abn = InPlaceABN(3)
    with pytest.raises(InputError, match="more than one value per channel"):
        abn(torch.randn(shape))
    assert abn.eval()(torch.randn(shape)).shape == shape  # the running statistics serve any number


def test_two_values_a_channel_can_train() -> None:
    assert torch.isfinite(InPlaceABN(3)(torch.randn(2, 3))).all()


@pytest.mark.parametrize("param", [0.0, -0.5, float("nan")])
@pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
def test_an_activation_that_cannot_be_inverted_is_refused(activation: str, param: float) -> None:
    with pytest.raises(OptionError, match="activation_param must be more than 0"):
        InPlaceABN(3, activation=activation, activation_param=param)  # type: ignore[arg-type]


def test_relu_is_refused_with_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"'relu' \(did you mean 'elu' or 'leaky_relu'"):
        InPlaceABN(3, activation="relu")  # type: ignore[arg-type]


def test_identity_ignores_the_parameter() -> None:
    assert InPlaceABN(3, activation="identity", activation_param=0)(torch.randn(2, 3)).shape == (
        2,
        3,
    )


def _loss(abn: InPlaceABN) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    return x, abn.double()(x * 1).square().sum()


def test_a_graph_that_is_kept_can_be_walked_again() -> None:
    """With ``retain_graph`` backward works on a copy, so the second one is right too."""
    x, loss = _loss(InPlaceABN(3))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_a_graph_that_is_not_kept_cannot_be_walked_again() -> None:
    x, loss = _loss(InPlaceABN(3))
    torch.autograd.grad(loss, x)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


def test_another_reader_of_z_that_comes_after_backward_is_refused() -> None:
    """Its graph holds a z that has become a gradient: autograd's version counter sees it."""
    x = torch.randn(2, 3, 8, requires_grad=True)
    z = InPlaceABN(3)(x * 1)
    first, second = z.sum(), z.square().sum()
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_double_backward_is_refused() -> None:
    x, loss = _loss(InPlaceABN(3))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(gradient.sum())


def test_a_producer_that_needs_its_output_is_refused() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    loss = InPlaceABN(3)(torch.sigmoid(x)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_a_later_reader_of_the_input_is_refused() -> None:
    """A pre-activation residual: it would add z where the network means x."""
    conv, abn = nn.Conv1d(3, 3, 1), InPlaceABN(3)
    x = conv(torch.randn(2, 3, 8))
    y = abn(x)
    with pytest.raises(InputError, match=r"add reads the input of an in-place norm after"):
        x + y
    with pytest.raises(InputError, match=r"conv1d reads the input .* give the norm a copy"):
        conv(x)
    assert x.shape == y.shape  # what tells of it without its values may be asked
    assert repr(x) == "Overwritten(shape=(2, 3, 8))"


def test_an_earlier_reader_of_the_input_that_kept_it_is_refused() -> None:
    conv = nn.Conv1d(3, 3, 1)
    x = torch.randn(2, 3, 8, requires_grad=True) * 1
    branch = conv(x)
    loss = (InPlaceABN(3)(x) + branch).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_an_expanded_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"expanded here \(strides \(0, 4, 1\)\).*clone"):
        InPlaceABN(3)(torch.randn(1, 3, 4).expand(2, 3, 4))


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_a_skip_made_before_or_after_gets_its_gradient_whole(early: bool) -> None:
    """Before, of the norm's input, by an operation that keeps nothing; after, of its result."""
    torch.manual_seed(0)
    leaf = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    norm, abn = nn.BatchNorm1d(3).double(), InPlaceABN(3).double()
    with torch.no_grad():
        norm.weight.add_(abn.eps)

    def run(layer: nn.Module) -> Tensor:
        x = leaf * 2
        skip = x + 1 if early else None
        z = layer(x)
        loss: Tensor = (z + (z * 3 if skip is None else skip)).sigmoid().sum()
        return loss

    plain = nn.Sequential(norm, nn.LeakyReLU(0.01))
    (expected,) = torch.autograd.grad(run(plain), leaf)
    (actual,) = torch.autograd.grad(run(abn), leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_two_losses_on_one_z_add_up() -> None:
    x, _ = _loss(InPlaceABN(3))
    abn = InPlaceABN(3).double()
    z = abn(x * 1)
    (together,) = torch.autograd.grad(z.square().sum() + z.sin().sum(), x)
    z = abn(x * 1)
    first, second = z.square().sum(), z.sin().sum()
    (one,) = torch.autograd.grad(first, x, retain_graph=True)
    (other,) = torch.autograd.grad(second, x)
    torch.testing.assert_close(one + other, together, rtol=1e-12, atol=1e-14)


def test_an_expanded_gradient_is_read() -> None:
    x, _ = _loss(InPlaceABN(3))
    weights = torch.randn(3, 1, dtype=torch.float64)
    grads = [
        torch.autograd.grad(InPlaceABN(3).double()(x * 1), x, dz)[0]
        for dz in (weights.expand(2, 3, 8), weights.expand(2, 3, 8).contiguous())
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-13, atol=1e-14)


def test_a_later_change_of_z_is_refused() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    z = InPlaceABN(3)(x * 1)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(z.sum())


def test_the_package_offers_it() -> None:
    assert memsave.InPlaceABN is InPlaceABN
