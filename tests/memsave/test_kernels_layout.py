"""How tensors are laid out for the kernels: remembered, and the same for symbolic sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from memsave.kernels.tiles import Layout, lay_out, tile

SHAPE = (2, 6, 3, 5, 7)


def _channels_last() -> Tensor:
    return torch.empty(SHAPE).to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("groups", [None, 2])
def test_a_layout_is_a_tiling_and_the_strides_of_both(groups: int | None) -> None:
    """Strides of (N, C, S): 105 places side by side, or 6 channels."""
    x, dz = torch.empty(SHAPE), _channels_last()
    first, last = (630, 105, 1), (630, 1, 6)
    assert lay_out(groups, x) == Layout(tile(SHAPE, groups, first), first, first)
    assert lay_out(groups, x, dz) == Layout(tile(SHAPE, groups, first, last), first, last)
    assert lay_out(groups, dz, x) == Layout(tile(SHAPE, groups, last, first), last, first)


def test_the_like_is_laid_out_once() -> None:
    assert lay_out(None, torch.empty(SHAPE)) is lay_out(None, torch.empty(SHAPE))


def test_a_gradient_of_x_strides_of_its_own_is_told_from_none() -> None:
    """A batch that is one run of places stays it: both have the same strides."""
    x = torch.empty(4, 1, 8)
    assert lay_out(None, x) == lay_out(None, x, torch.empty_like(x))


ODD = {
    "float64": torch.empty(SHAPE).double(),
    "uneven": torch.empty(2, 6, 3, 5, 14)[..., ::2][..., :4],
}


@pytest.mark.parametrize("name", ODD)
def test_what_the_kernels_cannot_take_has_no_layout(name: str) -> None:
    """As x, or as its gradient."""
    odd = ODD[name]
    assert lay_out(None, odd) is None
    assert lay_out(None, torch.empty(odd.shape), odd) is None


@pytest.mark.parametrize("groups", [None, 2])
def test_symbolic_sizes_are_laid_out_as_real_ones(groups: int | None) -> None:
    """A compiler's sizes have no hash, so that they cannot be remembered."""
    sizes: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 5)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = mode.from_tensor(torch.empty(SHAPE), symbolic_context=sizes)
    assert isinstance(fake.shape[0], torch.SymInt)
    laid_out, real = lay_out(groups, fake), lay_out(groups, torch.empty(SHAPE))
    assert laid_out is not None
    assert real is not None
    assert int(laid_out.cut.partials) == real.cut.partials
    assert tuple(map(int, laid_out.strides)) == real.strides
