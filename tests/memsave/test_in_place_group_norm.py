"""In-place group and instance norm compute what the plain layers compute, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsave
from memsave.errors import InputError, OptionError, UnknownNameError
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm, in_place_group_norm
from tests.memsave.kept_bytes import saved_bytes
from tests.memsave.norm_formulas import plain_norm

SHAPES = [((3, 4, 5), 2), ((2, 6, 3, 4), 6), ((2, 4, 2, 3, 3), 1), ((5, 6), 2)]
ACTIVATIONS = [("leaky_relu", 0.01), ("elu", 1.5), ("identity", 1.0)]


def _parameters(channels: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.rand(channels, dtype=torch.float64) + 0.5
    weight[0] *= -1
    bias = torch.randn(channels, dtype=torch.float64)
    return weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize(("activation", "param"), ACTIVATIONS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_gradcheck_in_float64(
    shape: tuple[int, ...], groups: int, activation: str, param: float
) -> None:
    weight, bias = _parameters(shape[1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # gradcheck runs it again and again, so x is a copy
        return in_place_group_norm(
            x.clone(), groups, weight, bias, 1e-5, activation, param  # type: ignore[arg-type]
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (x, weight, bias))


@pytest.mark.parametrize(("activation", "param"), ACTIVATIONS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_result_and_gradients_are_the_formulas(
    shape: tuple[int, ...], groups: int, activation: str, param: float
) -> None:
    weight, bias = _parameters(shape[1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dz = torch.randn(shape, dtype=torch.float64)
    expected = plain_norm(x, groups, weight, bias, 1e-5, activation, param)
    expected_grads = torch.autograd.grad(expected, (x, weight, bias), dz)
    actual = in_place_group_norm(
        x * 1, groups, weight, bias, 1e-5, activation, param  # type: ignore[arg-type]
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)
    grads = torch.autograd.grad(actual, (x, weight, bias), dz)
    # Inverting costs a few roundings of 1e-16; 1/std of a group of 3 values may be some tens.
    torch.testing.assert_close(grads, expected_grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_torchs_group_norm_and_leaky_relu_in_every_type(dtype: torch.dtype) -> None:
    """torch rounds between norm and activation, and we after both: two roundings of the type."""
    torch.manual_seed(0)
    norm = InPlaceGroupNorm(3, 6)
    x = (torch.randn(2, 6, 7, 5) * 3 + 1).to(dtype)
    scale = torch.full((6,), 1 + norm.eps)
    expected = F.leaky_relu(F.group_norm(x.float(), 3, scale, torch.zeros(6)), 0.01)
    actual = norm(x.clone())
    assert actual.dtype == dtype
    bound = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.float(), expected, rtol=bound, atol=2e-6)


def test_instance_norm_is_torchs() -> None:
    torch.manual_seed(0)
    norm, plain = InPlaceInstanceNorm(4, affine=True), nn.InstanceNorm3d(4, affine=True)
    nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(2, 4, 3, 5, 2, requires_grad=True)
    expected = F.leaky_relu(plain(x), 0.01)
    actual = norm(x * 1)
    # the scale is |weight| + 1e-5 here
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    (expected_dx,) = torch.autograd.grad(expected.square().sum(), x)
    (actual_dx,) = torch.autograd.grad(actual.square().sum(), x)
    torch.testing.assert_close(actual_dx, expected_dx, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision_are_float64s_within_the_inversions_bound(
    dtype: torch.dtype,
) -> None:
    """xhat is off by 2 u (|xhat| + |bias|), u half the type's eps; slope 0.1 keeps float16 dense.

    dx takes that times the mean of dy xhat, at most 1 here, and is rounded itself; dy is off by
    itself where y is within its rounding of 0, which is one value in some hundreds.
    """
    torch.manual_seed(0)
    x, dz = torch.randn(2, 4, 400).to(dtype), torch.randn(2, 4, 400).to(dtype)
    leaf = x.double().requires_grad_()
    plain = plain_norm(leaf, 2, None, None, 1e-5, "leaky_relu", 0.1)
    (expected,) = torch.autograd.grad(plain, leaf, dz.double())
    half = x.clone().requires_grad_()
    torch.autograd.backward(in_place_group_norm(half * 1, 2, activation_param=0.1), dz)
    assert half.grad is not None
    unit = torch.finfo(dtype).eps / 2
    error = (half.grad.double() - expected).abs().flatten()
    assert error.kthvalue(int(0.99 * error.numel())).values.item() <= 12 * unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_gives_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values, dz = torch.randn(2, 8, 5, 3, 4).to(dtype), torch.randn(2, 8, 5, 3, 4).to(dtype)
    norm, results = InPlaceGroupNorm(4, 8), []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        leaf = values.clone().requires_grad_()
        z = norm((leaf * 1).to(memory_format=layout))
        kept = z.detach().clone()
        z.backward(dz)
        assert leaf.grad is not None
        results.append((kept.contiguous(), leaf.grad.contiguous()))
    bound = 4 * torch.finfo(dtype).eps  # sums in another order
    torch.testing.assert_close(results[0], results[1], rtol=bound, atol=bound)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_a_huge_mean_costs_no_digits(layout: torch.memory_format, groups: int) -> None:
    """At a million, where float32 counts in sixteenths, and the mean of as much is no such number.

    The rest is what xhat costs without one: a few roundings of 4, as far as it goes here.
    """
    torch.manual_seed(0)
    x = (torch.randn(1, 6, 9, 31, 37) + 1e6).to(memory_format=layout)
    expected = plain_norm(x.double(), groups, None, None, 1e-5, "identity", 1)
    actual = in_place_group_norm(x, groups, activation="identity")
    assert (actual.double() - expected).abs().max().item() < 8 * 4 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_constant_group_gives_its_bias(layout: torch.memory_format) -> None:
    """Whatever its value, which is no number of float32: no rounding of a mean shows."""
    x = torch.full((2, 6, 37, 53), 12345.678).to(memory_format=layout)
    z = in_place_group_norm(x, 2, None, torch.ones(6))
    torch.testing.assert_close(z, torch.ones_like(z), rtol=0, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_parts_of_any_number_give_the_same(
    dtype: torch.dtype, layout: torch.memory_format, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, and in as many as there can be: groups larger than a part are among them."""
    torch.manual_seed(0)
    values = torch.randn(2, 32, 19, 3).to(dtype).to(memory_format=layout)
    dz = torch.randn_like(values)
    weight, bias = torch.rand(32).double() + 0.5, torch.randn(32).double()
    if dtype == torch.float16:
        weight, bias = weight.float(), bias.float()
    results = []
    for small in (2**22, 0):
        monkeypatch.setattr("memsave.in_place_abn_maths.SMALL_ELEMENTS", small)
        leaves = [t.clone().requires_grad_() for t in (values, weight, bias)]
        x = leaves[0] * 1
        z = in_place_group_norm(x, groups, leaves[1], leaves[2], activation_param=0.1)
        kept = z.detach().clone()
        torch.autograd.backward(z, dz)
        results.append([kept, *(leaf.grad for leaf in leaves)])
    # The parameters' gradients are sums of 114 values in another order; the rest rounds alike.
    bound = 1e-12 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(results[0], results[1], rtol=bound, atol=bound)


def test_only_z_and_one_number_a_group_are_kept() -> None:
    x = torch.randn(2, 6, 5, 4, requires_grad=True)
    group, instance = InPlaceGroupNorm(3, 6), InPlaceInstanceNorm(6)
    assert saved_bytes(lambda: group(x * 1), group) == 2 * 6 * 5 * 4 * 4 + 2 * 3 * 4
    assert saved_bytes(lambda: instance(x * 1), instance) == 2 * 6 * 5 * 4 * 4 + 2 * 6 * 4


def test_a_batch_of_nothing_passes() -> None:
    z = InPlaceGroupNorm(2, 4)(torch.randn(0, 4, 3, requires_grad=True) * 1)
    torch.autograd.backward(z.sum())
    assert z.shape == (0, 4, 3)


def test_state_dicts_load_both_ways() -> None:
    ours, plain = InPlaceGroupNorm(2, 4), nn.GroupNorm(2, 4)
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    assert list(InPlaceInstanceNorm(4).state_dict()) == []


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="3 groups do not divide 4 channels"):
        InPlaceGroupNorm(3, 4)
    with pytest.raises(OptionError, match="0 groups do not divide"):
        InPlaceGroupNorm(0, 4)
    with pytest.raises(OptionError, match="activation_param must be more than 0"):
        InPlaceInstanceNorm(4, activation_param=0)
    with pytest.raises(UnknownNameError, match="activation of in-place group norm 'relu'"):
        InPlaceGroupNorm(2, 4, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="instance norm has 4 channels, got an input with 6"):
        InPlaceInstanceNorm(4)(torch.randn(1, 6, 3))
    with pytest.raises(InputError, match=r"more than one value per group, got 1: 4 groups"):
        InPlaceInstanceNorm(4)(torch.randn(3, 4))
    with pytest.raises(InputError, match="group norm overwrites its input, which is a leaf"):
        InPlaceGroupNorm(2, 4)(torch.randn(1, 4, 3, requires_grad=True))
    with pytest.raises(InputError, match=r"3 channels \(bias\)"):
        in_place_group_norm(torch.randn(1, 4, 3), 2, None, torch.randn(3))


def test_repr_names_the_options() -> None:
    assert repr(InPlaceGroupNorm(2, 4)) == (
        "InPlaceGroupNorm(2, 4, eps=1e-05, affine=True, activation=leaky_relu[0.01])"
    )
    assert repr(InPlaceInstanceNorm(4)) == (
        "InPlaceInstanceNorm(4, eps=1e-05, affine=False, activation=leaky_relu[0.01])"
    )


def test_the_package_offers_them() -> None:
    assert memsave.InPlaceGroupNorm is InPlaceGroupNorm
    assert memsave.InPlaceInstanceNorm is InPlaceInstanceNorm
