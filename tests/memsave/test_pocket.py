"""PocketNet: twelve parameter counts, what each block keeps, shapes and divisors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from memsave.errors import InputError, OptionError, UnknownNameError
from memsave.networks import PocketNet2D, PocketNet3D, find_network
from memsave.networks.pocket import pocketnet_2d_divisor, pocketnet_3d_divisor
from memsave.networks.pocket_blocks import DenseNetBlock3D
from tests.memsave.descent import assert_gradient_is_the_slope
from tests.memsave.kept_bytes import saved_bytes

PARAMETERS_3D = {
    ("unet", "doubling"): 5_470_850,
    ("resnet", "doubling"): 5_470_850,
    ("densenet", "doubling"): 8_127_266,
    ("unet", "pocket"): 150_066,
    ("resnet", "pocket"): 150_066,
    ("densenet", "pocket"): 241_282,
}
PARAMETERS_2D = {
    ("unet", "doubling"): 544_081,
    ("resnet", "doubling"): 544_081,
    ("densenet", "doubling"): 625_841,
    ("unet", "pocket"): 36_433,
    ("resnet", "pocket"): 36_433,
    ("densenet", "pocket"): 41_921,
}
BLOCKS = ("unet", "resnet", "densenet")
WIDTHS = [(4, 6, 8), (5, 5, 5)]
N, X, Y, SLICES = 2, 8, 12, 3
FLOAT, INDEX = 4, 8  # bytes


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("block", "widths"), PARAMETERS_3D, ids=str)
def test_parameters_in_3d_are_exactly_the_papers(block: str, widths: str) -> None:
    with torch.device("meta"):
        model = PocketNet3D(block=block, widths=widths)
    assert _parameters(model) == PARAMETERS_3D[block, widths]


@pytest.mark.parametrize(("block", "widths"), PARAMETERS_2D, ids=str)
def test_parameters_in_2d_are_exactly_the_papers(block: str, widths: str) -> None:
    with torch.device("meta"):
        model = PocketNet2D(block=block, widths=widths)
    assert _parameters(model) == PARAMETERS_2D[block, widths]


def _kept_by_block_3d(block: str, i: int, o: int) -> int:
    """Channels that an i -> o block keeps beside its input, its result included."""
    return {
        "unet": o + o,
        "resnet": o + o + o,  # both ReLUs' results, and the sum
        "densenet": (i + o) + o + o + (i + 2 * o) + o,  # two concatenations, three results
    }[block]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_bytes_kept_in_3d_are_those_of_the_shapes(block: str, widths: tuple[int, ...]) -> None:
    """The blocks, the poolings' results and indices, and [up, skip] in front of each decoder.

    The last block's sum or concatenation is read by the head, which keeps it.
    """
    model = PocketNet3D(block=block, widths=widths)
    voxels = [N * SLICES * (Y >> level) * (X >> level) for level in range(3)]
    kept = N * SLICES * Y * X * FLOAT  # the image
    for level, (i, o) in enumerate(zip((1, *widths), widths, strict=False)):
        kept += _kept_by_block_3d(block, i, o) * voxels[level] * FLOAT
        kept += i * voxels[level] * (FLOAT + INDEX) if level > 0 else 0
    for level, o in enumerate(widths[:-1]):
        kept += (2 * o + _kept_by_block_3d(block, 2 * o, o)) * voxels[level] * FLOAT
    image = torch.randn(N, 1, SLICES, Y, X)
    assert saved_bytes(lambda: model(image), model) == kept


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_bytes_kept_in_2d_are_those_of_the_shapes(block: str, widths: tuple[int, ...]) -> None:
    """The stem, the blocks, what is pooled and what comes of it, [stem, decoder], the sigmoid."""
    model = PocketNet2D(block=block, widths=widths)
    pixels = [N * (X >> level) * (Y >> level) for level in range(3)]
    # ReLUs' results and sums; or two results, [x, y1, y2] and a result.
    in_block = {"unet": 2, "resnet": 4, "densenet": 2 + 3 + 1}[block]
    kept = (1 + widths[0]) * pixels[0] * FLOAT  # the image; the stem's result
    for level, width in enumerate(widths):
        kept += in_block * width * pixels[level] * FLOAT
    for level, (width, below) in enumerate(pairwise(widths)):
        widened = below if below != width else 0  # else the pooling reads the block's result
        kept += widened * pixels[level] * FLOAT
        kept += below * pixels[level + 1] * (FLOAT + INDEX)
        kept += (1 + in_block) * width * pixels[level] * FLOAT  # upsampled; the decoder's block
    if block == "resnet":
        kept -= widths[0] * pixels[0] * FLOAT  # the last sum goes into a concatenation alone
    kept += 2 * widths[0] * (pixels[0] + N) * FLOAT  # dropout's result; a number a channel
    kept += pixels[0] * FLOAT  # the sigmoid's result
    assert saved_bytes(lambda: model(torch.randn(N, 1, X, Y)), model) == kept


@pytest.mark.parametrize("widths", ["doubling", "pocket"])
@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_reach_every_parameter(block: str, widths: str) -> None:
    torch.manual_seed(0)
    in_3d = PocketNet3D(block=block, widths=widths, base_width=4, levels=3)
    image = torch.randn(1, 1, 2, 8, 8)
    target = (image[:, 0] > 0).long()
    assert_gradient_is_the_slope(
        in_3d, image, lambda logits: nn.functional.cross_entropy(logits, target)
    )
    in_2d = PocketNet2D(block=block, widths=widths, base_width=4, levels=3)
    mask = (image[:, :, 0] > 0).double()
    assert_gradient_is_the_slope(in_2d, image[:, :, 0], lambda p: (p - mask).square().mean())


def test_in_3d_a_decoder_block_reads_what_comes_from_below_and_then_the_skip() -> None:
    model = PocketNet3D(widths=[4, 6, 8])
    skips: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    for block in model.encoder[:-1]:
        block.register_forward_hook(lambda *args: skips.append(args[2]))
    for block in model.decoder:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(1, 1, 2, 8, 8))
    for skip, read in zip(skips[::-1], seen, strict=True):
        assert torch.equal(read[:, skip.shape[1] :], skip)


def test_in_3d_a_dense_block_reads_its_input_first() -> None:
    block = DenseNetBlock3D(3, 2)
    seen: list[torch.Tensor] = []
    for conv in (block.conv2, block.pointwise):
        conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(1, 3, 2, 4, 4)
    block(x)
    y1 = block.conv1(x)
    assert torch.equal(seen[0], torch.cat([x, y1], dim=1))
    assert torch.equal(seen[1], torch.cat([x, y1, block.conv2(seen[0])], dim=1))


def test_slices_are_never_pooled_and_come_first() -> None:
    model = PocketNet3D(base_width=2)
    assert model.divisor == (16, 16, 1)
    assert model(torch.randn(1, 1, 5, 16, 32)).shape == (1, 2, 5, 16, 32)
    assert find_network("pocketnet_3d").input_sides((32, 16, 5)) == (5, 16, 32)
    with pytest.raises(InputError, match=r"multiples of \(1, 16, 16\), got \(16, 16, 5\)"):
        model(torch.randn(1, 1, 16, 16, 5))


def test_in_2d_the_only_skip_is_the_stems() -> None:
    """With nothing but zeros from the levels, the head still sees the stem."""
    model = PocketNet2D(base_width=4).eval()
    for block in model.decoder:
        nn.init.zeros_(block[1][0].weight)  # type: ignore[index]
    image = torch.randn(1, 1, 8, 8, requires_grad=True)
    result = model(image)
    torch.autograd.backward(result.sum())
    expected = nn.functional.conv2d(model.stem(image), model.head.weight[:, :4], model.head.bias)
    torch.testing.assert_close(result, expected.sigmoid())  # one convolution of fewer zeros
    assert image.grad is not None
    assert image.grad.any()


@pytest.mark.parametrize("widths", ["doubling", "pocket"])
def test_channels_change_through_a_linear_convolution_where_they_do(widths: str) -> None:
    model = PocketNet2D(widths=widths)
    kinds = [type(m) for m in model.widening]
    assert kinds == [nn.Conv2d if widths == "doubling" else nn.Identity] * 3


def test_probabilities_are_float32_under_autocast() -> None:
    model = PocketNet2D(base_width=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(torch.randn(1, 1, 8, 8))
    assert result.dtype == torch.float32
    assert 0 < result.min() < result.max() < 1


def test_weights_start_from_hes_distribution_and_biases_at_0() -> None:
    """Standard deviation sqrt(2 / fan in), 24 * 27 here; its estimate deviates by 0.6 %."""
    torch.manual_seed(0)
    model = PocketNet3D(widths=[24, 24], in_channels=24)
    conv = model.encoder[0][0][0]  # type: ignore[index]
    assert isinstance(conv, nn.Conv3d)
    assert conv.weight.std().item() == pytest.approx((2 / (24 * 27)) ** 0.5, rel=0.03)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("options", "in_3d", "in_2d"),
    [
        ({}, 16, 8),
        ({"levels": 2}, 2, 2),
        ({"widths": [4] * 3}, 4, 4),
        ({"widths": "pocket"}, 16, 8),
    ],
    ids=str,
)
def test_the_divisor_is_known_without_building(
    options: dict[str, Any], in_3d: int, in_2d: int
) -> None:
    assert pocketnet_3d_divisor(options) == (in_3d, in_3d, 1)
    assert pocketnet_2d_divisor(options) == (in_2d, in_2d)
    with torch.device("meta"):
        assert PocketNet3D(**options).divisor == (in_3d, in_3d, 1)
        assert PocketNet2D(**options).divisor == (in_2d, in_2d)


@pytest.mark.parametrize("network", [PocketNet2D, PocketNet3D])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block": "resnt"}, UnknownNameError, "unknown block 'resnt' .did you mean 'resnet'"),
        ({"widths": "poket"}, UnknownNameError, "unknown widths .*'pocket'"),
        ({"classes": 0}, OptionError, "classes must be an integer of 1 or more, got 0"),
        ({"widths": [4, 8], "base_width": 16}, OptionError, "base_width is 16, but widths"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    network: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        network(**options)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("network", "sides"), [(PocketNet2D, (8, 8)), (PocketNet3D, (2, 8, 8))], ids=["2d", "3d"]
)
def test_blocks_to_checkpoint_run_in_order_and_leave_their_input(
    network: Any, sides: tuple[int, ...], block: str
) -> None:
    model = network(widths=[4, 6, 8], block=block)
    names = model.checkpointable_blocks()
    order: list[str] = []

    def before(name: str, image: Any) -> None:
        order.append(name)
        versions[name] = image, image._version

    versions: dict[str, Any] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: before(name, args[0])
        )
    model(torch.randn(1, 1, *sides))
    assert tuple(order) == names
    assert all(image._version == version for image, version in versions.values())
