"""The blocks: their layers, and that they are one to another as the paper says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memsave.blocks import BLOCKS, NORMS, batch_norm, find_block, find_norm
from memsave.convolution import convolution
from memsave.errors import OptionError, UnknownNameError
from memsave.in_place_abn import InPlaceABN

I, M, O = 4, 6, 8  # noqa: E741 - in, mid and out channels, as networks write i -> m -> o
R = O // 4

# (input channels / groups, output channels, kernel width, groups) of each convolution
CONVOLUTIONS = {
    "double_conv": [(I, M, 3, 1), (M, O, 3, 1)],
    "bottleneck": [(I, R, 1, 1), (R, R, 3, 1), (R, O, 1, 1)],
    "sepconv": [(1, I, 3, I), (I, M, 1, 1), (1, M, 3, M), (M, O, 1, 1)],
    "ccblock": [(I, R, 1, 1), (1, R, 3, R), (R, O, 1, 1)],
    "reversible": [(I, O, 3, 1), (O // 2, O // 2, 3, 1), (O // 2, O // 2, 3, 1)],
}
NORMED = {
    "double_conv": [M, O],
    "bottleneck": [R, R, O],
    "sepconv": [M, O],
    "ccblock": [R, O],
    "reversible": [O, O // 2, O // 2],
}


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_has_the_papers_convolutions(name: str, norm: str, spatial_dims: int) -> None:
    block = find_block(name)(I, M, O, find_norm(norm), spatial_dims)
    found = [
        (m.in_channels // m.groups, m.out_channels, m.kernel_size[0], m.groups)
        for m in block.modules()
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    normed = [
        p.numel() for n, p in block.named_parameters() if n.endswith("bias")
    ]  # no conv has one
    assert found == CONVOLUTIONS[name]
    assert normed == NORMED[name]
    assert block(torch.randn(2, I, *(5,) * spatial_dims)).shape == (2, O, *(5,) * spatial_dims)
    counted = sum(p.numel() for p in block.parameters())
    weights = sum(i * o * k**spatial_dims for i, o, k, _ in CONVOLUTIONS[name])
    assert counted == weights + 2 * sum(normed)  # of norms: weight and bias


def test_batch_norm_comes_after_the_activation() -> None:
    activation, norm = batch_norm(4, 3)
    assert isinstance(activation, nn.ReLU)
    assert activation.inplace
    assert isinstance(norm, nn.BatchNorm3d)


def test_in_place_abn_norm_is_leaky_by_a_hundredth() -> None:
    norm = find_norm("inplace_abn")(4, 2)
    assert isinstance(norm, InPlaceABN)
    assert (norm.activation, norm.activation_param) == ("leaky_relu", 0.01)


@pytest.mark.parametrize("name", ["bottleneck", "ccblock"])
def test_output_channels_must_be_reducible(name: str) -> None:
    with pytest.raises(OptionError, match="that 4 divides, got 6"):
        find_block(name)(4, 4, 6, batch_norm, 3)


def test_spatial_dims_beyond_three_are_refused() -> None:
    with pytest.raises(OptionError, match="spatial_dims must be 1, 2 or 3, got 4"):
        convolution(1, 1, 3, spatial_dims=4)


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown block 'sepcon'.*'sepconv'"):
        find_block("sepcon")
    with pytest.raises(
        UnknownNameError,
        match=r"unknown norm 'xyz.*known: batch_norm, batch_norm_leaky_relu, group_norm_leaky",
    ):
        find_norm("xyz")
