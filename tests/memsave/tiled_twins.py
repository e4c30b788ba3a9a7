"""A small FCN and its tiled twin, trained one step side by side in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.networks.fcn import FCN
from memsave.tiled import TiledLevelsOptions, TiledUNet, tile_levels

__all__ = ["PLAIN_TWIN", "Twins", "assert_equal_gradients", "batch_of", "twins"]

# The in-place norms' own gradients come from inverting their result, with slope 0.01 within
# 100 roundings: the plain norms compute the same function more exactly.
PLAIN_TWIN = {
    "inplace_abn": "batch_norm_leaky_relu",
    "inplace_group_norm": "group_norm_leaky_relu",
    "inplace_instance_norm": "instance_norm_leaky_relu",
}


@dataclass(frozen=True, slots=True)
class Twins:
    """The same weights twice: ``signs`` turns a tiled gradient into its twin's."""

    plain: FCN
    tiled: TiledUNet
    signs: dict[str, Tensor]  # by the tiled network's names


def twins(
    options: TiledLevelsOptions,
    *,
    norm: str = "batch_norm_leaky_relu",
    block: str = "ccblock",
    widths: Sequence[int] = (8, 16, 24),
    dtype: torch.dtype = torch.float64,
) -> Twins:
    """Return a plain network and a tiled one, with weights of norms away from 1 and 0."""
    torch.manual_seed(0)
    tiled = FCN(widths=widths, block=block, norm=norm).to(dtype)
    plain = FCN(widths=widths, block=block, norm=PLAIN_TWIN.get(norm, norm)).to(dtype)
    signs: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in tiled.named_modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(bias, Tensor):
                weight.uniform_(0.5, 1.5)
                weight[::3] *= -1  # in-place norms take the absolute value
                bias.normal_()
                signs[f"{name}.weight"] = weight.sign()
        if norm not in PLAIN_TWIN:
            signs = {}
        for own, other in zip(tiled.parameters(), plain.parameters(), strict=True):
            other.copy_(own)
        if norm in PLAIN_TWIN:
            _take_absolute_weights(tiled, plain)
    return Twins(plain, tile_levels(copy.deepcopy(tiled), options), signs)


def _take_absolute_weights(in_place: nn.Module, plain: nn.Module) -> None:
    """Give the plain norms the scale |weight| + eps."""
    kinds = (InPlaceABN, InPlaceGroupNorm, InPlaceInstanceNorm)
    eps = [m.eps for m in in_place.modules() if isinstance(m, kinds)]
    norms = [
        m
        for m in plain.modules()
        if isinstance(m, nn.BatchNorm3d | nn.GroupNorm | nn.InstanceNorm3d)
    ]
    for norm, added in zip(norms, eps, strict=True):
        norm.weight.copy_(norm.weight.abs() + added)


def batch_of(shape: Sequence[int], *, samples: int = 1, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return images in float64 and class indices, for three classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((samples, 1, *shape), dtype=torch.float64, generator=generator)
    return images, torch.randint(3, (samples, *shape), generator=generator)


def assert_equal_gradients(pair: Twins) -> None:
    """Assert that all gradients agree to float64's rounding.

    1e-12 of a tensor's largest gradient, some thousand roundings, leaves room for sums over
    thousands of voxels in another order; 1e-14 of the network's largest is for gradients that
    cancel to nothing, as those of a convolution that scales its only channel before a norm.
    """
    largest = max(float(p.grad.abs().max()) for p in pair.plain.parameters() if p.grad is not None)
    named = zip(pair.tiled.named_parameters(), pair.plain.parameters(), strict=True)
    for (name, tiled), plain in named:
        assert tiled.grad is not None, name
        assert plain.grad is not None, name
        actual = tiled.grad * pair.signs.get(name, 1)
        atol = 1e-12 * float(plain.grad.abs().max()) + 1e-14 * largest
        worst = float((actual - plain.grad).abs().max())
        assert worst <= atol, f"{name}: {worst:.1e} off, {atol:.1e} allowed"
