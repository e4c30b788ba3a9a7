"""DenseVNet and the light U-Net: parameters, FLOPs, what dense stacks keep, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memsave.errors import InputError, OptionError, UnknownNameError
from memsave.in_place_abn import InPlaceABN
from memsave.networks import DenseVNet, LightUNet, build
from memsave.networks.dense_vnet import DenseStack, dense_vnet_divisor
from memsave.networks.light_unet import light_unet_divisor
from memsave.networks.norm_relu import find_norm_relu
from memsave.techniques import find_technique, parse_options
from tests.memsave.descent import assert_gradient_is_the_slope
from tests.memsave.kept_bytes import saved_bytes

NORMS = ["batch_norm", "inplace_abn"]


@pytest.mark.parametrize("norm", NORMS)
def test_dense_vnets_parameters_are_exactly_the_papers(norm: str) -> None:
    with torch.device("meta"):
        model = DenseVNet(norm=norm)
    assert sum(p.numel() for p in model.parameters()) == 871_922


@pytest.mark.parametrize("norm", NORMS)
def test_dense_vnets_convolutions_cost_48_gflop(norm: str) -> None:
    """The paper prints 20,339,341,715 and does not say of what."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        DenseVNet(norm=norm)(torch.empty(1, 1, 96, 128, 192))
    assert counter.get_total_flops() == 47_952_691_200


def test_dense_stacks_give_45_104_and_184_channels_at_a_half_a_quarter_and_an_eighth() -> None:
    with torch.device("meta"):
        model = DenseVNet()
        shapes: list[tuple[int, ...]] = []
        for stack in model.stacks:
            stack.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape[1:])))
        logits = model(torch.empty(1, 1, 16, 32, 24))
    assert shapes == [(45, 8, 16, 12), (104, 4, 8, 6), (184, 2, 4, 3)]
    assert logits.shape == (1, 5, 16, 32, 24)


def test_a_layer_sees_all_before_it_in_its_stack_and_dropout_spares_the_last() -> None:
    with torch.device("meta"):
        stacks = DenseVNet().stacks
    for stack, layers, growth, first in zip(
        stacks, (5, 10, 10), (4, 8, 16), (25, 24, 24), strict=True
    ):
        assert isinstance(stack, DenseStack)
        inputs = [layer.conv.in_channels for layer in stack.layers]  # type: ignore[union-attr]
        assert inputs == [first + k * growth for k in range(layers)]
        dropped = [isinstance(layer[-1], nn.Dropout) for layer in stack.layers]  # type: ignore[index]
        assert dropped == [True] * (layers - 1) + [False]


@pytest.mark.parametrize(("norm", "negative"), [("batch_norm", 0.0), ("inplace_abn", -0.01)])
def test_the_norm_comes_first_and_then_the_activation(norm: str, negative: float) -> None:
    """Of -3 and 3, whose mean is 0 and deviation 3, the norm makes -1 and 1, but for its eps."""
    layer = find_norm_relu(norm)(1, 3)
    result = layer(torch.tensor([-3.0, 3.0]).view(1, 1, 2, 1, 1))
    # eps is 1e-5 of a variance of 9, and 1e-5 more on in-place ABN's weight.
    torch.testing.assert_close(result.flatten(), torch.tensor([negative, 1.0]), rtol=2e-5, atol=0)


def test_what_comes_into_a_stack_stands_first_in_what_leaves_it() -> None:
    torch.manual_seed(0)
    stack = DenseStack(3, 4, 2, find_norm_relu("batch_norm"), dropout=0.5).eval()
    features = torch.randn(1, 3, 4, 4, 4)
    result = stack(features)
    assert result.shape[1] == stack.out_channels == 11
    assert torch.equal(result[:, :3], features)
    for index in range(4):
        seen = result[:, : 3 + 2 * index]
        torch.testing.assert_close(result[:, 3 + 2 * index :][:, :2], stack.layers[index](seen))


@pytest.mark.parametrize("norm", NORMS)
def test_a_stack_keeps_every_concatenation_that_it_reads(norm: str) -> None:
    """Of L layers of growth g from i channels: the inputs i + k g, and a result or two of g."""
    i, layers, growth, voxels = 3, 4, 2, 2 * 4 * 5 * 6
    stack = DenseStack(i, layers, growth, find_norm_relu(norm), dropout=0)
    results, numbers = (2, 2) if norm == "batch_norm" else (1, 1)  # conv's and ReLU's; a channel
    channels = sum(i + k * growth + results * growth for k in range(layers))
    features = torch.randn(2, i, 4, 5, 6)
    kept = 4 * (channels * voxels + layers * numbers * growth)
    assert saved_bytes(lambda: stack(features), stack) == kept


def test_dense_vnet_reads_the_skips_resized_and_the_pooled_image() -> None:
    """12 + 24 + 24 + 1 channels at half the sides: averages of the image last, normalised."""
    model = DenseVNet().eval()
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.full((1, 1, 8, 16, 8), 3.0)
    model(image)
    assert seen[0].shape == (1, 61, 4, 8, 4)
    # Padding left out, the average of a constant is that constant; eps 1e-5 of the norm.
    expected = torch.full((1, 4, 8, 4), 3 / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(seen[0][:, -1], expected)


def test_in_place_abn_takes_the_place_of_every_norm() -> None:
    with torch.device("meta"):
        model = DenseVNet(norm="inplace_abn")
    norms = [m for m in model.modules() if isinstance(m, InPlaceABN)]
    # stem and pooled image, of 25 layers one each, three skips and two downs
    assert len(norms) == 2 + 25 + 3 + 2
    assert [n.activation for n in norms].count("identity") == 2
    assert not any(isinstance(m, nn.BatchNorm3d | nn.ReLU) for m in model.modules())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["dense_vnet", "light_unet"])
def test_gradients_reach_every_parameter(network: str, norm: str) -> None:
    torch.manual_seed(0)
    model = build(network, {"classes": 2, "norm": norm})
    image = torch.randn(1, 1, 16, 16, 16)
    target = (image[:, 0] > 0).long()
    assert_gradient_is_the_slope(
        model, image, lambda logits: nn.functional.cross_entropy(logits, target)
    )


def test_light_unet_has_8_to_64_channels_and_two_classes() -> None:
    """Its parameters: DoubleConvs with 2 norms, transposed convolutions with bias, a head."""
    model = LightUNet()
    assert model.widths == (8, 16, 32, 64)
    expected = 0
    for i, o in ((1, 8), (8, 16), (16, 32), (32, 64), (64, 32), (32, 16), (16, 8)):
        expected += 27 * (i * o + o * o) + 4 * o
    for o in (8, 16, 32):
        expected += 8 * 2 * o * o + o
    assert sum(p.numel() for p in model.parameters()) == expected + 8 * 2 + 2 == 350_818
    assert model(torch.randn(1, 1, 8, 16, 8)).shape == (1, 2, 8, 16, 8)


@pytest.mark.parametrize(
    ("options", "side"), [({}, 8), ({"levels": 2}, 2), ({"widths": [4, 4, 4]}, 4)], ids=str
)
def test_the_divisor_is_known_without_building(options: dict[str, Any], side: int) -> None:
    assert light_unet_divisor(options) == (side,) * 3
    assert LightUNet(**options).divisor == (side,) * 3
    assert dense_vnet_divisor({}) == (8, 8, 8)


@pytest.mark.parametrize("network", [DenseVNet, LightUNet])
def test_images_that_do_not_fit_are_refused(network: Any) -> None:
    with pytest.raises(InputError, match=r"multiples of \(8, 8, 8\), got \(8, 8, 12\)"):
        network()(torch.randn(1, 1, 8, 8, 12))
    with pytest.raises(InputError, match=r"\(N, 1, A, B, C\), got \(1, 2, 8, 8, 8\)"):
        network()(torch.randn(1, 2, 8, 8, 8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"norm": "inplace"}, UnknownNameError, "unknown norm 'inplace' .*'inplace_abn'"),
        ({"dropout": 1}, OptionError, "dropout must be from 0 to less than 1, got 1"),
        ({"dropout": True}, OptionError, "dropout must be .* got True"),
        ({"classes": 0}, OptionError, "classes must be an integer of 1 or more, got 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DenseVNet(**options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["dense_vnet", "light_unet"])
def test_checkpointed_blocks_give_the_same_gradients(network: str, norm: str) -> None:
    """Dropout's masks and the running statistics included."""
    technique = find_technique("checkpoint")
    seen = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = build(network, {"norm": norm})
        if checkpointed:
            technique.module(model, parse_options(technique, {}))
        torch.manual_seed(1)
        torch.autograd.backward(model(torch.randn(1, 1, 16, 16, 16)).square().mean())
        seen.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for plain, recomputed in zip(*seen, strict=True):
        assert plain is not None
        assert recomputed is not None
        assert torch.equal(plain, recomputed)
