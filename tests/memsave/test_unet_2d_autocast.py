"""The slices' U-Net under autocast: concatenations stay half, and nothing is computed otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memsave.networks import unet_2d
from memsave.networks.unet_2d import UNet2D


class Concatenations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the type of each concatenation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.types.append(result.dtype)
        return result


def step(network: nn.Module) -> tuple[Tensor, list[Tensor], list[torch.dtype]]:
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    network.zero_grad()
    with Concatenations() as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        maps = network(images)
    torch.autograd.backward(maps.float().square().mean())
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return maps, gradients, seen.types


@pytest.mark.parametrize("upsampling", ["nearest", "nearest_conv"])
def test_concatenations_are_half_and_all_values_those_of_float32_copies(
    upsampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against features upsampled as autocast would: result and gradients equal bit for bit."""
    torch.manual_seed(0)
    network = UNet2D(1, 4, (4, 8, 8), "batch_norm", upsampling)
    maps, gradients, types = step(network)
    assert types == [torch.bfloat16] * 2

    def in_float32(features: Tensor, layer: nn.Module) -> Tensor:
        if isinstance(layer, nn.Upsample):
            features = features.float()
        upsampled: Tensor = layer(features)
        return upsampled

    monkeypatch.setattr(unet_2d, "_upsampled", in_float32)
    expected, wanted, wide = step(network)
    assert wide == [torch.float32 if upsampling == "nearest" else torch.bfloat16] * 2
    assert torch.equal(maps, expected)
    assert len(gradients) == len(wanted)
    assert all(map(torch.equal, gradients, wanted))
