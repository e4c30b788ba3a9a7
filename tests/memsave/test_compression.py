"""``memsave.compress_activations``: bytes from shapes, errors within what the docstring bounds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import memsave
from memsave import compression_formats
from memsave.compression_formats import Format, Scale, compress, compressed_bytes, restore
from memsave.streams import use_streams
from tests.memsave.delayed_streams import DelayedStreams
from tests.memsave.kept_bytes import LiveBytes
from tests.memsave.traced_bytes import traced_kept_bytes

FORMATS: tuple[Format, ...] = ("bf16", "fp8", "int8")
SHAPE = (2, 3, 5, 4, 6)


def noise(seed: int = 0) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda x: x.uniform_(generator=generator)


def there_and_back(x: Tensor, form: Format, scale: Scale = "channel", seed: int = 0) -> Tensor:
    return restore(compress(x, form, scale, noise(seed)), x.dtype)


def error_bound(x: Tensor, form: Format, scale: Scale = "channel") -> Tensor:
    """The docstring's e(x), of float32; with 2^-20 of itself for the arithmetic in float32."""
    dims = [d for d in range(x.dim()) if d != 1 or scale == "tensor"]
    most = x.abs().amax(dims, keepdim=True)
    bounds = {
        "bf16": x.abs() * 2**-8,
        "fp8": torch.maximum(x.abs() * 2**-4, most / 448 * 2**-10),
        "int8": (most / 127).expand_as(x),
    }
    # bf16 and fp8 round to nearest, so the bound is met with equality: float32's own rounding of
    # x / step and its product, three operations of 2^-24 each, comes on top.
    return bounds[form] * (1 + 2**-20) + x.abs() * 2**-20


# -- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [SHAPE, (7, 5), (64,), (1, 1, 1), ()], ids=str)
def test_each_value_comes_back_within_its_bound(
    form: Format, scale: Scale, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-3, 3, x_channels(shape)).reshape(
        [-1 if d == 1 else 1 for d in range(len(shape))]
    )
    effective = scale if len(shape) > 1 else "tensor"
    actual = there_and_back(x, form, scale)
    assert ((actual - x).abs() <= error_bound(x, form, effective)).all()
    assert (actual.dtype, actual.stride()) == (x.dtype, x.stride())


def x_channels(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_other_types_come_back_in_their_own(dtype: torch.dtype, form: Format) -> None:
    """Half a unit in the last place of the type comes on top: the result is rounded to it."""
    x = torch.randn(SHAPE).to(dtype)
    actual = there_and_back(x, form)
    assert actual.dtype == dtype
    exact = x.to(torch.float32)
    bound = error_bound(exact, form) + actual.abs().float() * torch.finfo(dtype).eps / 2
    assert ((actual.float() - exact).abs() <= bound).all()


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean over n draws deviates by less than 6 standard errors of at most step / 2 each.

    1,000 draws of 240 values: a fair rounding passes all but once in 2 million runs, and the seed
    is fixed; rounding down would be off by half a step, which is 30 standard errors.
    """
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40)
    draws = 1000
    generator = noise()
    mean = torch.zeros_like(x)
    for _ in range(draws):
        mean += restore(compress(x, "int8", "channel", generator), x.dtype) / draws
    step = x.abs().amax((0, 2), keepdim=True) / 127
    assert ((mean - x).abs() <= 6 * step / 2 / draws**0.5).all()
    assert (mean != x).any()


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_channel_that_is_not_finite_comes_back_as_nan(form: Format, bad: float) -> None:
    x = torch.randn(2, 3, 4)
    x[1, 2, 3] = bad
    actual = there_and_back(x, form)
    assert actual[:, 2].isnan().all()
    assert actual[:, :2].isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_and_the_smallest_values_come_back_finite(form: Format) -> None:
    x = torch.zeros(1, 3, 4)
    x[0, 1] = 1e-45
    x[0, 2, 1] = 3e38
    actual = there_and_back(x, form)
    assert (actual[0, 0] == 0).all()
    assert actual.isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_slabs_change_nothing(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is drawn slab by slab, from one generator and so in another order: int8 in bounds."""
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last_3d)
    whole = there_and_back(x, form)
    monkeypatch.setattr(compression_formats, "_SLAB_ELEMENTS", 100)
    cut = there_and_back(x, form)
    if form == "int8":
        assert ((cut - x).abs() <= error_bound(x, form)).all()
    else:
        assert torch.equal(cut, whole)
    assert cut.stride() == x.stride()


@pytest.mark.parametrize("shape", [(1, 500), (500,)])
def test_slabs_of_few_dimensions(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression_formats, "_SLAB_ELEMENTS", 100)
    x = torch.randn(shape)
    assert ((there_and_back(x, "fp8") - x).abs() <= error_bound(x, "fp8")).all()


# -- gradients -----------------------------------------------------------------------------------


def convolution_gradients(form: Format | None, seed: int | None = None) -> tuple[Tensor, ...]:
    """Return x, dy, dW and dx of a convolution whose input is compressed."""
    torch.manual_seed(1)
    model = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 9, 8).requires_grad_()
    options: dict[str, Any] = {"format": form, "minimum_bytes": 0, "seed": seed}
    source = x * 1  # so that the input is nobody's leaf
    if form is None:
        y = model(source)
    else:
        with memsave.compress_activations(model, **options):
            y = model(source)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert model.weight.grad is not None
    assert x.grad is not None
    return x.detach(), dy, model.weight.grad, x.grad


@pytest.mark.parametrize("form", FORMATS)
def test_a_weights_gradient_is_within_the_bound_and_the_inputs_is_exact(form: Format) -> None:
    x, dy, exact, dx = convolution_gradients(None)
    _, _, actual, compressed_dx = convolution_gradients(form)
    assert torch.equal(compressed_dx, dx)
    e = error_bound(x, form).double()
    dy_size = dy.abs().double()
    (bound,) = torch.autograd.grad(  # sum |dy| e(x)
        F.conv2d(e, w := torch.zeros(exact.shape, dtype=e.dtype).requires_grad_()), w, dy_size
    )
    assert (actual != exact).any()
    # 1e-5: the sums are of 84 products in float32 on both sides.
    assert ((actual - exact).abs() <= bound + 1e-5).all()


def test_int8_gradients_are_unbiased() -> None:
    """The mean over 300 seeds is within 6 standard errors, each ``m / 254 * sqrt(sum dy^2)``."""
    x, dy, exact, _ = convolution_gradients(None)
    draws = 300
    mean = torch.stack([convolution_gradients("int8", seed)[2] for seed in range(draws)]).mean(0)
    most = x.abs().amax((0, 2, 3))
    spread = (
        most[None, :, None, None] / 254 * dy.square().sum((0, 2, 3)).sqrt()[:, None, None, None]
    )
    assert ((mean - exact).abs() <= 6 * spread / draws**0.5).all()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 4, 3)
    )


def network_gradients(model: nn.Module, steps: int = 1, **options: Any) -> list[Tensor]:
    """Return the gradients of the last of some steps, from one state of the random generator."""
    torch.manual_seed(7)
    x = torch.randn(2, 2, 12, 12)
    for _ in range(steps):
        model.zero_grad()
        with memsave.compress_activations(model, **options):
            loss = model(x).square().mean()
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_equal_seeds_give_equal_gradients_and_others_do_not() -> None:
    model = network()
    runs = [
        network_gradients(copy.deepcopy(model), minimum_bytes=100, seed=seed)
        for seed in (None, 0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))


def test_rounding_goes_on_from_step_to_step() -> None:
    model = nn.Conv2d(2, 2, 1)
    one = network_gradients(copy.deepcopy(model), 1, minimum_bytes=0)
    two = network_gradients(copy.deepcopy(model), 2, minimum_bytes=0)
    assert not torch.equal(one[0], two[0])


def test_the_global_generator_is_not_drawn_from() -> None:
    """The same state after it, so dropout draws the masks that it would draw without."""
    model = network()
    network_gradients(model, minimum_bytes=0)
    after = torch.get_rng_state()
    network_gradients(model, minimum_bytes=2**30)
    assert torch.equal(torch.get_rng_state(), after)


# -- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"format": "bf16"}, 2 * 2 * 16 * 10 * 10),
        ({"format": "fp8"}, 2 * 16 * 10 * 10 + 4 * 16),
        ({"format": "fp8", "scale": "tensor"}, 2 * 16 * 10 * 10 + 4),
        ({"format": "int8"}, 2 * 16 * 10 * 10 + 4 * 16),
    ],
)
def test_bytes_kept_are_those_of_the_formula(options: dict[str, Any], kept: int) -> None:
    """A convolution's input of (2, 16, 10, 10) that nobody else holds."""

    def prepare() -> Callable[[], object]:
        model, x = nn.Conv2d(16, 1, 3), torch.randn(2, 16, 10, 10)

        def forward() -> Tensor:
            with memsave.compress_activations(model, minimum_bytes=2 * 16 * 10 * 10 * 4, **options):
                y: Tensor = model(x * 2)
            return y

        return forward

    output = 2 * 1 * 8 * 8 * 4
    assert traced_kept_bytes(prepare) == kept + output

    live = LiveBytes()
    forward = prepare()
    with live:
        y = forward()
    assert live.now_bytes == kept + output
    x = torch.empty(2, 16, 10, 10)
    assert compressed_bytes(x, options["format"], options.get("scale", "channel")) == kept
    del y


def test_what_several_save_is_compressed_once() -> None:
    model, x = nn.Conv2d(4, 1, 1), torch.randn(1, 4, 8, 8, requires_grad=True)
    live = LiveBytes()
    with live, memsave.compress_activations(model, minimum_bytes=0):
        y = x * 2
        results = model(y), y.sin()
    del y
    assert live.now_bytes == (256 + 4 * 4) + 4 * 64 + 4 * 256  # y in int8, and both results
    del results


@pytest.mark.parametrize(("minimum_bytes", "exact"), [(4 * 64 * 4, False), (4 * 64 * 4 + 1, True)])
def test_tensors_from_the_minimum_on_are_compressed(minimum_bytes: int, exact: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(1, 4, 8, 8, requires_grad=True)
    with memsave.compress_activations(nn.ReLU(), format="fp8", minimum_bytes=minimum_bytes):
        y = (w * 1).sin()
    torch.autograd.backward(y.sum())
    assert torch.equal(w.grad, w.detach().cos()) == exact  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda w: w.half(), "bf16"),  # would not get smaller
        (lambda w: (w * 1)[:, ::2], "fp8"),  # a part of a storage
        (lambda w: (w * 1).sum((2, 3), keepdim=True).expand(1, 4, 8, 8), "fp8"),
        (lambda w: (w * 1).reshape(1, -1), "int8"),  # as many scales as values
    ],
)
def test_what_cannot_get_smaller_is_kept_as_it_is(
    make: Callable[[Tensor], Tensor], form: Format
) -> None:
    w = torch.randn(1, 4, 8, 8, requires_grad=True)
    with memsave.compress_activations(nn.ReLU(), format=form, minimum_bytes=0):
        y = make(w)
        z = y.sin()
    dz = torch.ones_like(z)
    (actual,) = torch.autograd.grad(z, y, dz)
    assert torch.equal(actual, y.detach().cos())


def test_parameters_and_their_casts_are_exact() -> None:
    model = nn.Linear(16, 16)
    x = torch.randn(3, 16, requires_grad=True)
    with (
        memsave.compress_activations(model, format="fp8", minimum_bytes=16 * 16 * 2),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        y = model(x)
    y.sum().backward()
    expected = F.linear(torch.ones(3, 16).bfloat16(), model.weight.detach().bfloat16().t())
    assert torch.equal(x.grad, expected.float())  # type: ignore[arg-type]


def test_views_of_a_compressed_storage_are_views_of_what_comes_back() -> None:
    w = torch.randn(2, 4, 6, requires_grad=True)
    with memsave.compress_activations(nn.ReLU(), format="fp8", minimum_bytes=0):
        y = w * 1
        z = y.sin(), y.permute(2, 0, 1).sin()
    one, other = (torch.autograd.grad(part.sum(), w, retain_graph=True)[0] for part in z)
    assert torch.equal(one, other)


# -- with others ---------------------------------------------------------------------------------


def test_offload_moves_what_compression_keeps() -> None:
    torch.manual_seed(0)
    plain, streams = nn.Conv2d(4, 1, 1), DelayedStreams()
    x = torch.randn(2, 4, 16, 16)

    def gradient(offloads: bool) -> Tensor:
        names = ["compress_activations", *["offload"] * offloads]
        model = copy.deepcopy(plain)
        applied = memsave.apply(model, [(n, {"minimum_bytes": 2 * 4 * 256}) for n in names])
        with applied.step():
            loss = model(x * 1).square().mean()
        loss.backward()
        assert model.weight.grad is not None
        return model.weight.grad

    with use_streams(streams):
        moved = gradient(offloads=True)
    assert streams.log == [("out", 2 * 4 * 256)]  # in int8; the output's int8 is too small
    assert torch.equal(moved, gradient(offloads=False))


def test_recompute_hands_on_what_it_keeps() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))
    applied = memsave.apply(
        model, ["recomputed_norm_act", ("compress_activations", {"minimum_bytes": 2 * 8 * 100 * 4})]
    )
    x, live = torch.randn(2, 2, 12, 12), LiveBytes()
    with live, applied.step():
        y = applied.model(x)
    # The norm's input in int8; its mean and rstd; the output. Not the activation's result.
    assert live.now_bytes == 2 * 8 * 100 + 4 * 8 + 2 * 4 * 8 + 2 * 100 * 4
    y.sum().backward()


def test_in_place_norms_are_refused_but_for_bf16() -> None:
    model = memsave.FCN(widths=(4, 8), norm="inplace_abn")
    with pytest.raises(memsave.OptionError, match=r"in-place norm, which inverts.*use format bf16"):
        memsave.apply(model, ["compress_activations"])
    applied = memsave.apply(model, [("compress_activations", {"format": "bf16"})])
    with applied.step():
        model(torch.randn(1, 1, 8, 8, 8)).sum().backward()


def test_it_is_refused_inside_recompute() -> None:
    model = memsave.RecomputedNormAct(nn.BatchNorm2d(3), nn.ReLU())
    with (
        memsave.recompute(model),
        pytest.raises(memsave.OptionError, match="enter compress_activations first"),
        memsave.compress_activations(model),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp4"}, "format must be one of bf16, fp8, int8, got 'fp4'"),
        ({"scale": "row"}, "scale must be"),
        ({"format": "bf16", "scale": "tensor"}, "bf16 has no scale"),
        ({"format": "fp8", "seed": 1}, "only format int8 rounds at random"),
        ({"minimum_bytes": -1}, "minimum_bytes must be 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with (
        pytest.raises(memsave.OptionError, match=message),
        memsave.compress_activations(nn.ReLU(), **options),
    ):
        pass


@pytest.mark.parametrize("form", FORMATS)
def test_fake_tensors_go_the_same_way(form: Format) -> None:
    state = torch.get_rng_state()
    with FakeTensorMode():
        model = nn.Conv2d(2, 2, 1)
        with memsave.compress_activations(model, format=form, minimum_bytes=0):
            y = model(torch.randn(1, 2, 4, 4) * 1)
        y.sum().backward()
        assert model.weight.grad is not None
    assert torch.equal(torch.get_rng_state(), state)
