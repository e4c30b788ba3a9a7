"""The Triton kernels against the formulas in float64: compiled on a GPU, else interpreted."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memsave.kernels.tiles import Tiling, collapse, kernels_serve, tile
from tests.memsave.norm_formulas import plain_norm

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from memsave.kernels.norm_backward import gradient_, sums
from memsave.kernels.norm_forward import normalise_, statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def _strides(x: Tensor) -> tuple[int, int, int]:
    strides = collapse(x)
    assert strides is not None
    return strides


def _empty(*shape: int) -> Tensor:
    """Of NaN, so that what a kernel forgets to write shows."""
    return torch.full(shape, torch.nan, device=DEVICE)


def _forward(
    x: Tensor,
    groups: int | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "leaky_relu",
    param: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Overwrite x; return mean and 1/std."""
    cut = tile(x.shape, groups, _strides(x))
    partials, mean, rstd = _empty(cut.partials), _empty(cut.statistics), _empty(cut.statistics)
    statistics(x, _strides(x), cut, partials, mean, rstd, EPS)
    normalise_(x, _strides(x), cut, mean, rstd, weight, bias, EPS, activation, param)
    return mean, rstd


def _backward(
    z: Tensor,
    dz: Tensor,
    rstd: Tensor,
    groups: int | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "leaky_relu",
    param: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Overwrite z with dx; return the gradients of weight and bias."""
    at, dz_at = _strides(z), _strides(dz)
    cut = tile(z.shape, groups, at, dz_at)
    partials, means = _empty(cut.partials), _empty(2, cut.statistics)
    d_weight, d_bias = _empty(cut.channels), _empty(cut.channels)
    rest = (weight, bias, EPS, activation, param)
    sums(z, at, dz, dz_at, cut, partials, d_weight, d_bias, means, *rest)
    gradient_(z, at, dz, dz_at, cut, rstd, means, *rest)
    return d_weight, d_bias


def _parameters(channels: int) -> tuple[Tensor, Tensor]:
    weight = torch.rand(channels, device=DEVICE) + 0.5
    weight[::2] *= -1
    return weight, torch.randn(channels, device=DEVICE)


def _layout(name: str) -> Callable[[Tensor], Tensor]:
    if name == "channels_last":
        return lambda x: torch.empty_like(x.movedim(1, -1).contiguous()).movedim(-1, 1).copy_(x)
    return torch.Tensor.contiguous


CASES = [
    ((2, 5, 3, 7, 11), None),  # odd sizes
    ((1, 3, 9000), None),  # more than two tiles a row
    ((3, 6, 40, 5), 2),
    ((2, 6, 17, 3), 6),  # instance norm
    ((5, 4), None),  # no places at all
    ((3, 66, 9), None),  # more channels than a tile has when they lie side by side
    ((2, 66, 9), 33),
    ((4, 8), 2),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_values_and_gradients_are_the_formulas(
    shape: tuple[int, ...], groups: int | None, layout: str
) -> None:
    """Float32 rounding of values of order 1, and of sums of up to 9,000 terms, taken in parts."""
    torch.manual_seed(0)
    weight, bias = _parameters(shape[1])
    x = torch.randn(shape, device=DEVICE) * 2 + 1
    dz = torch.randn(shape, device=DEVICE)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = plain_norm(leaves[0], groups, leaves[1], leaves[2], EPS, "leaky_relu", 0.01)
    expected_dx, expected_dw, expected_db = torch.autograd.grad(expected, leaves, dz.double())

    z, dz = _layout(layout)(x), _layout(layout)(dz)
    given = dz.clone()
    _, rstd = _forward(z, groups, weight, bias)
    torch.testing.assert_close(z.double(), expected, rtol=2e-6, atol=2e-6)
    d_weight, d_bias = _backward(z, dz, rstd, groups, weight, bias)

    terms = x.numel() / shape[1]
    assert torch.equal(dz, given)
    torch.testing.assert_close(d_bias.double(), expected_db, rtol=1e-6, atol=1e-6 * terms**0.5)
    torch.testing.assert_close(d_weight.double(), expected_dw, rtol=1e-5, atol=3e-6 * terms**0.5)
    scale = rstd.max().item()  # 1/std of few values may be large
    torch.testing.assert_close(z.double(), expected_dx, rtol=1e-5, atol=1e-5 * max(1, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("activation", "param"), [("leaky_relu", 0.1), ("elu", 1.5), ("identity", 1.0)]
)
def test_every_activation_in_every_type(activation: str, param: float, dtype: torch.dtype) -> None:
    """One rounding of the result to its type; z then gives xhat within that, over the slope."""
    torch.manual_seed(0)
    weight, bias = _parameters(4)
    x = torch.randn(2, 4, 333, device=DEVICE).to(dtype)
    dz = torch.randn(2, 4, 333, device=DEVICE).to(dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = plain_norm(leaves[0], None, leaves[1], leaves[2], EPS, activation, param)
    expected_grads = torch.autograd.grad(expected, leaves, dz.double())

    z = x.clone()
    _, rstd = _forward(z, None, weight, bias, activation, param)
    unit = torch.finfo(dtype).eps / 2
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        unit *= 2  # the interpreter cuts off where a card rounds
    # one rounding of the result; inside, float32 rounds terms of up to 4 a few times
    inside = 8 * torch.finfo(torch.float32).eps
    bound = 1.01 * unit + inside
    torch.testing.assert_close(z.double(), expected, rtol=bound, atol=inside)
    d_weight, d_bias = _backward(z, dz, rstd, None, weight, bias, activation, param)
    # xhat is off by at most 10 roundings (slope 0.1; ELU's at -2 is 0.2) of values up to 4;
    # a sum of 666 such terms, of either sign, by sqrt(666) of that.
    atol = 40 * bound
    torch.testing.assert_close(z.double(), expected_grads[0], rtol=bound, atol=atol)
    for actual, wanted in zip((d_weight, d_bias), expected_grads[1:], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=bound, atol=26 * atol)


@pytest.mark.parametrize("groups", [None, 2])
def test_without_weight_and_bias(groups: int | None) -> None:
    torch.manual_seed(0)
    x, dz = torch.randn(2, 4, 50, device=DEVICE), torch.randn(2, 4, 50, device=DEVICE)
    leaf = x.double().requires_grad_()
    expected = plain_norm(leaf, groups, None, None, EPS, "leaky_relu", 0.01)
    (expected_dx,) = torch.autograd.grad(expected, leaf, dz.double())
    _, rstd = _forward(x, groups, None, None)
    torch.testing.assert_close(x.double(), expected, rtol=2e-6, atol=2e-6)
    _backward(x, dz, rstd, groups, None, None)
    torch.testing.assert_close(x.double(), expected_dx, rtol=1e-5, atol=1e-5)


def test_given_statistics_leave_the_means_out() -> None:
    torch.manual_seed(0)
    weight, bias = _parameters(3)
    z, dz = torch.randn(2, 3, 70, device=DEVICE), torch.randn(2, 3, 70, device=DEVICE)
    rstd = torch.rand(3, device=DEVICE) + 0.5
    slope = torch.where(z > 0, 1.0, 0.01)
    expected = dz * slope * ((weight.abs() + EPS) * rstd)[None, :, None]
    cut = tile(z.shape, None, _strides(z), _strides(dz))
    rest = (weight, bias, EPS, "leaky_relu", 0.01)
    gradient_(z, _strides(z), dz, _strides(dz), cut, rstd, None, *rest)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "dz",
    [
        torch.ones(()).expand(2, 4, 5, 6),
        torch.arange(4.0).view(1, 4, 1, 1).expand(2, 4, 5, 6),
        torch.randn(2, 9, 5, 6)[:, 2:6],
        torch.randn(2, 5, 6, 4).movedim(-1, 1),
    ],
    ids=["expanded", "expanded over places", "slice of channels", "channels last"],
)
def test_a_gradient_of_another_layout_is_read_where_it_is(dz: Tensor) -> None:
    torch.manual_seed(0)
    weight, bias = _parameters(4)
    dz = dz.to(DEVICE)
    z = torch.randn(2, 4, 5, 6, device=DEVICE)
    rstd = torch.rand(4, device=DEVICE) + 0.5
    expected = z.clone()
    expected_sums = _backward(expected, dz.contiguous(), rstd, None, weight, bias)
    actual_sums = _backward(z, dz, rstd, None, weight, bias)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual_sums, expected_sums, rtol=1e-5, atol=1e-5)


def test_the_statistics_of_a_huge_mean_and_of_a_constant() -> None:
    """Mean 1e6 and spread 8: float32 holds the values to 0.06, and the variance to 64 / 1e4."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 10_000, device=DEVICE) * 8 + 1e6
    x[:, 1] = 7.25
    cut = tile(x.shape, None, _strides(x))
    assert cut.splits > 1
    mean, variance = _empty(2), _empty(2)
    statistics(x, _strides(x), cut, _empty(cut.partials), mean, variance, as_variance=True)
    exact = x[:, 0].double()
    assert abs(mean[0].item() - exact.mean().item()) <= 0.0625
    assert variance[0].item() == pytest.approx(exact.var(correction=0).item(), rel=1e-4)
    assert mean[1].item() == 7.25
    assert variance[1].item() == 0


def test_an_outlier_in_front_does_not_spoil_the_variance() -> None:
    x = torch.randn(1, 1, 20_000, device=DEVICE)
    x[0, 0, 0] = 1e4
    cut = tile(x.shape, None, _strides(x))
    mean, variance = _empty(1), _empty(1)
    statistics(x, _strides(x), cut, _empty(cut.partials), mean, variance, as_variance=True)
    assert variance.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_running_statistics_are_batch_norms(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, device=DEVICE) + 1
    mean, var = torch.rand(3, device=DEVICE).to(dtype), torch.rand(3, device=DEVICE).to(dtype)
    expected_mean = 0.7 * mean.float() + 0.3 * x.mean((0, 2))
    expected_var = 0.7 * var.float() + 0.3 * x.var((0, 2))
    cut = tile(x.shape, None, _strides(x))
    at = _strides(x)
    statistics(x, at, cut, _empty(cut.partials), _empty(3), _empty(3), EPS, 0.3, mean, var)
    bound = torch.finfo(dtype).eps
    torch.testing.assert_close(mean, expected_mean.to(dtype), rtol=bound, atol=bound)
    torch.testing.assert_close(var, expected_var.to(dtype), rtol=bound, atol=bound)


def test_a_row_is_split_until_the_card_is_full() -> None:
    """64 channels of 96^3: 216 tiles a row, dealt out to 31 programs of 7, so 1,984 in all."""
    x = torch.empty(1, 64, 96, 96, 96, device="meta")
    cut = tile(x.shape, None, _strides(x))
    assert (cut.place_block, cut.channel_block) == (4096, 1)
    assert (cut.tiles_in_a_row, cut.tiles_per_split, cut.splits) == (216, 7, 31)
    assert cut.partials * 4 == 2 * 64 * 31 * 4


def test_channels_last_reads_a_line_of_channels() -> None:
    x = torch.empty(2, 96, 8, 8, 8, device="meta").to(memory_format=torch.channels_last_3d)
    cut = tile(x.shape, None, _strides(x))
    assert (cut.channel_block, cut.place_block) == (64, 64)
    assert (cut.samples, cut.places) == (1, 1024)  # the batch is one run of places


def test_partials_stay_small_beside_a_batch_of_vectors() -> None:
    """1e6 samples of 32 channels and no places: the samples are summed in the programs."""
    x = torch.empty(1_000_000, 32, device="meta")
    assert tile(x.shape, None, _strides(x)).partials <= 2 * 32 * 2112


def test_values_beyond_32_bits_are_counted() -> None:
    x = torch.empty(1, 1, 2**32, device="meta")
    cut: Tiling = tile(x.shape, None, _strides(x))
    assert cut.values_in_a_statistic == 2**32
    assert cut.tiles_per_split * cut.splits * cut.place_block >= 2**32


# Elements: a number of 32 bits, twice which is none. A stride of 64 bits would hide a narrow index.
FAR = 2**30 + 24


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 3, 5), (FAR, 5, 1)), ((1, 3, 5), (0, FAR, 1)), ((1, 8, 3), (0, 1, FAR))],
    ids=["samples", "channels", "places"],
)
@pytest.mark.parametrize("groups", [None, 1], ids=["batch", "group"])
def test_values_that_lie_beyond_32_bits_are_reached(
    shape: tuple[int, ...], strides: tuple[int, ...], groups: int | None
) -> None:
    """More than 2^31 elements apart, in 4 GiB of which only a few pages are ever touched."""
    torch.manual_seed(0)
    near = [torch.randn(shape, device=DEVICE).half() for _ in range(2)]
    far = [
        torch.empty(2 * FAR + 64, dtype=torch.float16, device=DEVICE).as_strided(shape, strides)
        for _ in range(2)
    ]
    for there, here in zip(far, near, strict=True):
        there.copy_(here)
    weight, bias = _parameters(shape[1])
    results = []
    for x, dz in (near, far):
        mean, rstd = _forward(x, groups, weight, bias)
        z = x.clone()
        gradients = _backward(x, dz, rstd, groups, weight, bias)
        results.append([mean, rstd, z, x, *gradients])
    for here, there in zip(*results, strict=True):
        # in other tiles, so sums come in another order; a rounding of float16 in z and dx
        torch.testing.assert_close(there, here, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("x", "served"),
    [
        (torch.empty(2, 3, 4, 5), True),
        (torch.empty(2, 3, 4, 5, dtype=torch.float64), False),
        (torch.empty(2, 3, 4, 5).transpose(2, 3), False),
        (torch.empty(2, 3, 4, 5, 2)[..., 0], True),
        (torch.empty(2, 3, 4, 1).transpose(2, 3), True),
    ],
    ids=["contiguous", "float64", "transposed", "every other", "one side of 1"],
)
def test_what_the_kernels_take(x: Tensor, served: bool) -> None:
    assert kernels_serve(x) == served
