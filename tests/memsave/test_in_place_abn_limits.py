"""In-place ABN: bytes, and what it refuses or autograd refuses for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsave
from memsave.errors import BackwardError, InputError, OptionError, UnknownNameError
from memsave.in_place_abn import InPlaceABN, in_place_abn
from memsave.in_place_abn_maths import (
    SMALL_ELEMENTS,
    Activation,
    activate_,
    compute_dtype,
    normalise_,
    scale_and_shift,
)
from memsave.in_place_backward_maths import backward_
from memsave.in_place_group_maths import backward_groups_, normalise_groups_
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
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
    ("dtype", "temporaries"), [(torch.float32, 1), (torch.float16, 2), (torch.float64, 1)], ids=str
)
def test_plain_backward_needs_eighths_of_the_activation(
    dtype: torch.dtype, temporaries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient takes z's place, so only temporaries of ``nbytes / 8`` come on top.

    dy; and y, where z is not of the type that is computed in.
    """
    monkeypatch.setattr("memsave.in_place_abn_maths.SMALL_ELEMENTS", 0)
    z = torch.randn(1, 64, 5000).to(dtype)
    # Of a channel: the sums, and a handful of numbers for the part at hand.
    assert 0 <= _peak_of_plain_backward(z) - temporaries * z.nbytes // 8 < 64 * 8 * 8


@pytest.mark.parametrize("samples", [1, 3])
def test_plain_backward_takes_channels_last_a_slab_of_places_at_a_time(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dy and, for the sums, a copy of z: an eighth of a sample each."""
    monkeypatch.setattr("memsave.in_place_abn_maths.SMALL_ELEMENTS", 0)
    z = torch.randn(samples, 64, 40, 100).to(memory_format=torch.channels_last)
    peak = _peak_of_plain_backward(z) - 2 * z[0].nbytes // 8
    assert 0 <= peak < 64 * 4 * 12


@pytest.mark.parametrize(("groups", "temporaries"), [(8, 1), (4, 1), (2, 2), (1, 2)])
def test_plain_backward_needs_no_more_for_a_group_that_is_large(
    groups: int, temporaries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eighth for dy, 16 of 128 channels; a larger group is inverted twice, once as a copy."""
    monkeypatch.setattr("memsave.in_place_abn_maths.SMALL_ELEMENTS", 0)
    z, numbers = torch.randn(2, 64, 5000), torch.ones(64)
    dz, rstd = torch.ones_like(z), torch.ones(2 * groups)
    with LiveBytes() as live:
        backward_groups_(z, dz, groups, numbers, numbers, rstd, "leaky_relu", 0.01)
    # Numbers of a channel, of which both samples have 128 together.
    assert 0 <= live.peak_bytes - temporaries * z.nbytes // 8 < 128 * 4 * 24


def test_plain_backward_takes_a_small_activation_in_one_piece() -> None:
    """Up to 2**22 elements: one temporary as large as it is."""
    z = torch.randn(1, 64, SMALL_ELEMENTS // 64)
    assert 0 <= _peak_of_plain_backward(z) - z.nbytes < 64 * 4 * 16


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_plain_forward_of_group_norm_has_no_temporary(layout: torch.memory_format) -> None:
    """In float32: sums of squares of a row, and numbers of a channel."""
    x = torch.randn(1, 64, 100, 100).to(memory_format=layout)
    numbers = torch.ones(64)
    with LiveBytes() as live:
        normalise_groups_(x, 1, numbers, numbers, 1e-5, "leaky_relu", 0.01)
    assert 0 < live.peak_bytes < x.nbytes // 50 + 64 * 4 * 24


def test_plain_forward_of_group_norm_converts_an_eighth_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In half precision a sixteenth of the elements, in float32, whatever the groups."""
    monkeypatch.setattr("memsave.in_place_abn_maths.SMALL_ELEMENTS", 0)
    x, numbers = torch.randn(1, 64, 5000).bfloat16(), torch.ones(64)
    with LiveBytes() as live:
        normalise_groups_(x, 1, numbers, numbers, 1e-5, "leaky_relu", 0.01)
    assert 0 <= live.peak_bytes - x.nbytes // 8 < 64 * 4 * 24


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


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_the_input_is_overwritten(grad: bool) -> None:
    x = torch.randn(2, 3, 4)
    values = x.clone()
    with torch.set_grad_enabled(grad):
        z = InPlaceABN(3)(x)
    assert z.data_ptr() == x.data_ptr()
    assert not torch.equal(z, values)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [InPlaceABN(4), InPlaceGroupNorm(2, 4)], ids=["abn", "group"])
def test_a_second_backward_of_a_graph_that_is_kept_is_refused(
    norm: nn.Module, dtype: torch.dtype
) -> None:
    """Where the first one keeps no copy of z, which would be an activation more in silence."""
    x = torch.randn(2, 4, 8).to(dtype).requires_grad_()
    z = norm(x * 1)
    dz = torch.ones_like(z)
    with LiveBytes() as live:
        torch.autograd.backward(z, dz, retain_graph=True, inputs=list(norm.parameters()))
    assert live.peak_bytes == 2 * 4 * 4  # the gradients of weight and bias
    with pytest.raises(BackwardError, match=r"no second backward pass.*RecomputedNormAct"):
        torch.autograd.backward(z, dz)
    assert issubclass(BackwardError, RuntimeError)


def test_in_float64_a_graph_that_is_kept_can_be_walked_again() -> None:
    """On a copy of z: gradcheck, which float64 is for, walks it again and again."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_double_backward_is_refused(dtype: torch.dtype) -> None:
    """Also where dz has no history, so that autograd itself would leave the second term out."""
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    z = InPlaceABN(3).to(dtype)(x * 1)
    (gradient,) = torch.autograd.grad(z, x, torch.ones_like(z), create_graph=True)
    with pytest.raises(BackwardError, match=r"no double backward.*RecomputedNormAct"):
        torch.autograd.backward(gradient.square().sum() + x.sum())


def test_a_producer_that_needs_its_output_is_refused() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    loss = InPlaceABN(3)(torch.sigmoid(x)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda y: nn.Conv1d(4, 4, 1)(y),
    "view": lambda y: nn.Conv1d(4, 8, 1)(y)[:, 2:6],
    "image": lambda y: y,
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("made", INPUTS)
@pytest.mark.parametrize(
    "norm", [InPlaceABN(4), InPlaceInstanceNorm(4), InPlaceABN(4).eval()], ids=["abn", "in", "eval"]
)
def test_a_later_reader_of_the_input_is_refused(norm: nn.Module, made: str, grad: bool) -> None:
    """A pre-activation residual: it would add z where the network means x."""
    with torch.set_grad_enabled(grad):
        x = INPUTS[made](torch.randn(2, 4, 8))
        y = norm(x)
        with pytest.raises(InputError, match=r"add reads the input of an in-place norm after"):
            x + y
        with pytest.raises(InputError, match=r"conv1d reads .*x\.clone\(\).*RecomputedNormAct"):
            nn.Conv1d(4, 4, 1)(x)
        with pytest.raises(InputError, match=r"add_ reads the input"):
            x.add_(1)
    assert x.shape == y.shape  # what tells of it without its values may be asked
    assert repr(x) == "Overwritten(shape=(2, 4, 8))"


def test_a_view_of_a_base_with_other_readers_gets_all_their_gradients() -> None:
    """Half of the channels are normalised in place; the base's history knows of it."""
    leaf = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    base = leaf * 2
    z = InPlaceABN(3).double()(base[:, :3])
    (actual,) = torch.autograd.grad(z.square().sum() + base[:, 3:].sum(), leaf)
    plain = leaf * 2
    norm = nn.BatchNorm1d(3).double()
    with torch.no_grad():
        norm.weight.add_(1e-5)
    loss = F.leaky_relu(norm(plain[:, :3])).square().sum() + plain[:, 3:].sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    # some roundings of 1e-16, of sums of 16 terms
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_two_losses_on_one_z_add_up(dtype: torch.dtype) -> None:
    """One backward for their sum, in every type; one each in float64, where the graph is kept."""
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    abn, norm = InPlaceABN(3).to(dtype), nn.BatchNorm1d(3).to(dtype)
    with torch.no_grad():
        norm.weight.add_(abn.eps)
    z, plain = abn(x * 1), F.leaky_relu(norm(x))
    (expected,) = torch.autograd.grad(plain.square().sum() + plain.sin().sum(), x)
    first, second = z.square().sum(), z.sin().sum()
    bound = 1e4 * torch.finfo(dtype).eps  # slope 0.01 read back: 100 roundings, of sums of 16
    (together,) = torch.autograd.grad(first + second, x)
    torch.testing.assert_close(together, expected, rtol=bound, atol=bound)
    if dtype == torch.float64:
        z = abn(x * 1)
        first, second = z.square().sum(), z.sin().sum()
        (one,) = torch.autograd.grad(first, x, retain_graph=True)
        (other,) = torch.autograd.grad(second, x)
        torch.testing.assert_close(one + other, together, rtol=bound, atol=bound)


@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "identity"])
def test_an_expanded_gradient_is_read(activation: Activation) -> None:
    x, _ = _loss(InPlaceABN(3))
    weights = torch.randn(3, 1, dtype=torch.float64)
    grads = [
        torch.autograd.grad(InPlaceABN(3, activation=activation).double()(x * 1), x, dz)[0]
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
