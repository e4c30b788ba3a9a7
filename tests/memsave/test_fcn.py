"""The FCN: its parameters, the bytes that its variants keep, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memsave.errors import InputError, OptionError, UnknownNameError
from memsave.networks import FCN
from memsave.networks.fcn import fcn_divisor
from memsave.techniques import TECHNIQUES, parse_options
from tests.memsave.kept_bytes import LiveBytes, saved_bytes

PARAMETERS = {
    "double_conv": 9_522_787,
    "bottleneck": 3_216_915,
    "sepconv": 2_784_542,
    "ccblock": 2_635_395,
}
WIDTHS = (8, 16, 32)
SIDES = (8, 12, 4)


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
@pytest.mark.parametrize("block", PARAMETERS)
def test_parameters_are_exactly_the_papers(block: str, norm: str) -> None:
    with torch.device("meta"):
        model = FCN(block=block, norm=norm)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[block]


def _voxels(level: int) -> int:
    a, b, c = SIDES
    return (a >> level) * (b >> level) * (c >> level)


def _inside_encoder_block(block: str, norm: str, i: int, o: int) -> tuple[int, int]:
    """Channels that an encoder block keeps beside its input and result, and those of its norms.

    BatchNorm keeps the ReLU's output beside its own result, so its channels count twice but for
    the result of the block.
    """
    m, r = o // 2, o // 4
    normed, bare = {
        "double_conv": ([m, o], 0),
        "bottleneck": ([r, r, o], 0),
        "sepconv": ([m, o], i + m),  # the depthwise outputs
        "ccblock": ([r, o], r),
    }[block]
    again = sum(normed) if norm == "batch_norm" else 0
    return sum(normed) - o + bare + again, sum(normed)


def _kept_bytes(block: str, norm: str, *, inside: bool = True) -> int:
    """What one forward of ``FCN(widths=WIDTHS)`` keeps of a (1, 1, *SIDES) float32 image.

    Worked out from the shapes: inputs and results of blocks, the poolings' int64 indices, and
    with ``inside`` what the blocks keep between, and two numbers a channel of BatchNorm (mean,
    1/std) or one of in-place ABN (1/std).
    """
    values, indices, channels = 0, 0, 0
    inputs = (1, *WIDTHS[:-1])
    for level, (i, o) in enumerate(zip(inputs, WIDTHS, strict=True)):
        values += (i + o) * _voxels(level)  # the image or pooling's result; the block's result
        indices += i * _voxels(level) if level > 0 else 0
        between, normed = _inside_encoder_block(block, norm, i, o)
        values += between * _voxels(level)
        channels += normed
        if not inside:
            values -= between * _voxels(level)
    for level, o in enumerate(WIDTHS[:-1]):
        values += (o + o) * _voxels(level)  # the sum with the skip; the block's result
        between, normed = _inside_encoder_block("double_conv", norm, o, o)
        values += between * _voxels(level) if inside else 0
        channels += normed
    statistics = channels * (2 if norm == "batch_norm" else 1) if inside else 0
    return 4 * (values + statistics) + 8 * indices


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
@pytest.mark.parametrize("block", PARAMETERS)
def test_the_bytes_kept_are_those_of_the_shapes(block: str, norm: str) -> None:
    model = FCN(widths=WIDTHS, block=block, norm=norm)
    kept = saved_bytes(lambda: model(torch.randn(1, 1, *SIDES)), model)
    assert kept == _kept_bytes(block, norm)


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
@pytest.mark.parametrize("block", PARAMETERS)
def test_checkpointed_it_keeps_what_enters_and_leaves_its_blocks(block: str, norm: str) -> None:
    model = FCN(widths=WIDTHS, block=block, norm=norm)
    checkpoint = TECHNIQUES["checkpoint"]
    checkpoint.module(model, parse_options(checkpoint, {}))
    kept = saved_bytes(lambda: model(torch.randn(1, 1, *SIDES)), model)
    # torch hands its inputs to the recomputation through a node that also keeps, a region, an
    # empty tensor: 0 bytes.
    assert kept == _kept_bytes(block, norm, inside=False)


def test_prediction_holds_a_skip_until_its_sum_and_no_longer() -> None:
    """At the peak, inside the finest decoder block, live: its input and its two results."""
    model = FCN(widths=WIDTHS, norm="inplace_abn").eval()
    image = torch.randn(1, 1, *SIDES)
    with LiveBytes() as live, torch.no_grad():
        model(image)
    finest = WIDTHS[0] * _voxels(0) * 4
    small = 200 * 4  # scales and shifts of up to 32 channels
    # conv2 of the decoder: input (w), first half (w/2), second result (w).
    assert 2.5 * finest <= live.peak_bytes < 2.5 * finest + small


@pytest.mark.parametrize("norm", ["batch_norm", "inplace_abn"])
@pytest.mark.parametrize("block", PARAMETERS)
def test_it_learns(block: str, norm: str) -> None:
    """Every parameter gets a gradient, and a few steps lower the loss by half."""
    torch.manual_seed(0)
    model = FCN(widths=(8, 16), block=block, norm=norm)
    image = torch.randn(1, 1, 4, 8, 6)
    target = (image[:, 0] > 0).long() + (image[:, 0] > 1).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(image), target)
        torch.autograd.backward(loss)
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_logits_have_the_images_sides() -> None:
    model = FCN(in_channels=2, classes=5, widths="pocket", base_width=8, levels=3)
    assert model.widths == (8, 8, 8)
    assert model(torch.randn(2, 2, 4, 8, 12)).shape == (2, 5, 4, 8, 12)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 2, 8, 8, 8), (1, 8, 8, 8)], ids=str)
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(N, 1, A, B, C\), got"):
        FCN(widths=(4, 8))(torch.randn(shape))


def test_sides_that_cannot_be_pooled_are_refused() -> None:
    model = FCN(widths=(4, 8, 8))
    assert model.divisor == (4, 4, 4)
    with pytest.raises(InputError, match=r"multiples of \(4, 4, 4\), got \(4, 8, 6\)"):
        model(torch.randn(1, 1, 4, 8, 6))
    assert model(torch.randn(1, 1, 4, 8, 12)).shape == (1, 3, 4, 8, 12)


@pytest.mark.parametrize(
    ("options", "divisor"),
    [({}, 8), ({"levels": 1}, 1), ({"widths": [4, 4]}, 2), ({"widths": "pocket", "levels": 5}, 16)],
    ids=str,
)
def test_the_divisor_is_known_without_building(options: dict[str, Any], divisor: int) -> None:
    assert fcn_divisor(options) == (divisor,) * 3
    with torch.device("meta"):
        assert FCN(**options).divisor == fcn_divisor(options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block": "ccblok"}, UnknownNameError, "unknown block 'ccblok' .did you mean 'ccblock'"),
        ({"norm": "inplace-abn"}, UnknownNameError, "unknown norm .*did you mean 'inplace_abn'"),
        ({"widths": "doubled"}, UnknownNameError, "unknown widths .*did you mean 'doubling'"),
        ({"classes": 0}, OptionError, "classes must be an integer of 1 or more, got 0"),
        ({"in_channels": True}, OptionError, "in_channels must be .* got True"),
        ({"base_width": 6, "block": "ccblock"}, OptionError, "that 4 divides, got 6"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FCN(**options)


def test_blocks_to_checkpoint_are_its_modules_in_order() -> None:
    model = FCN(widths=(4, 8, 8))
    names = model.checkpointable_blocks()
    assert names == ("encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1")
    order: list[str] = []
    for name in names:
        block = model.get_submodule(name)
        block.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        assert isinstance(next(iter(block.children())), nn.Conv3d)
    model(torch.randn(1, 1, 8, 8, 8))
    assert tuple(order) == names


def test_a_step_on_fake_tensors_runs_without_data() -> None:
    """Constructor, forward and backward read no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = FCN(block="ccblock", norm="inplace_abn")
        logits: Tensor = model(torch.randn(1, 1, 256, 256, 240))
        torch.autograd.backward(logits.sum())
    assert logits.shape == (1, 3, 256, 256, 240)
    assert all(p.grad is not None for p in model.parameters())
