"""The plain norms followed by leaky ReLU: what the in-place norms are held against."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memsave.blocks import find_norm

TWINS = {
    "batch_norm_leaky_relu": "inplace_abn",
    "group_norm_leaky_relu": "inplace_group_norm",
    "instance_norm_leaky_relu": "inplace_instance_norm",
}


@pytest.mark.parametrize(("plain", "in_place"), TWINS.items())
def test_the_twins_compute_the_same_from_one_state(plain: str, in_place: str) -> None:
    """Outputs in float64: the in-place scale is |weight| + 1e-5, all that they differ by."""
    torch.manual_seed(0)
    twins = [find_norm(name)(12, 3).double() for name in (plain, in_place)]
    x = torch.randn(2, 12, 5, 4, 3, dtype=torch.float64)
    expected = twins[0](x.clone())
    actual = twins[1](x.clone().requires_grad_() * 1)  # no leaf, which is not overwritten
    torch.testing.assert_close(actual, expected, rtol=1.1e-5, atol=1e-12)
    assert [p.shape for p in twins[0].parameters()] == [p.shape for p in twins[1].parameters()]


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("name", TWINS)
def test_norm_comes_before_a_leaky_relu_of_slope_a_hundredth(name: str, spatial_dims: int) -> None:
    norm, activation = find_norm(name)(4, spatial_dims).children()
    assert isinstance(activation, nn.LeakyReLU)
    assert (activation.negative_slope, activation.inplace) == (0.01, True)
    x = torch.randn(2, 4, *(6,) * spatial_dims)
    normed = norm(x)
    assert normed.mean(dim=(0, *range(2, x.dim()))).abs().max() < 0.2
    torch.testing.assert_close(activation(normed.clone()), nn.functional.leaky_relu(normed))
