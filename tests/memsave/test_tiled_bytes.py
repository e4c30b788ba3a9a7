"""What tiled levels keep, to the byte; their peak; and the size of what they compute with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memsave.networks.fcn import FCN
from memsave.tiled import TiledLevelsOptions, TiledUNet, tile_levels
from memsave.tiled.level import Keep
from tests.memsave.kept_bytes import LiveBytes
from tests.memsave.traced_bytes import traced_kept_bytes

SHAPE = (8, 8, 12)
VOXELS, BELOW = math.prod(SHAPE), math.prod(SHAPE) // 8
LOSS = "cross_entropy+dice"


def small(options: TiledLevelsOptions) -> TiledUNet:
    """Two levels of 8 and 16 channels, the finer one tiled; in float32."""
    network = FCN(widths=(8, 16), block="ccblock", norm="batch_norm_leaky_relu")
    return tile_levels(network, options)


def prepare(keep: tuple[Keep, ...], slabs: int = 3) -> Callable[[], Callable[[], Tensor]]:
    """Return what makes the network and a batch, and then gives the forward."""

    def prepared() -> Callable[[], Tensor]:
        network = small(TiledLevelsOptions(slabs=slabs, keep=keep))
        images, target = torch.randn(1, 1, *SHAPE), torch.randint(3, (1, *SHAPE))
        return lambda: network.training_loss(images, target, LOSS)

    return prepared


def test_with_nothing_kept_only_half_resolution_remains() -> None:
    """Pooled features, the level below as it is, and the features that come back up.

    Below: the CCBlock from 8 to 16 channels keeps its input (8), the first norm's input and result
    (4 and 4), the depthwise result (4), the second norm's input and result (16 and 16); the
    upsampling's product has 8. A plain norm keeps mean and 1/std, a tiled one 5 such numbers and
    two sums in float64, the loss its 11 sums in float64 and itself.
    """
    below = BELOW * (8 + 4 + 4 + 4 + 16 + 16 + 8) * 4
    plain_norms = (4 + 16) * 2 * 4
    tiled_norms = (2 + 8 + 4 + 8) * (5 * 4 + 2 * 8)
    loss = 11 * 8 + 4
    assert traced_kept_bytes(prepare(())) == below + plain_norms + tiled_norms + loss


@pytest.mark.parametrize(
    ("keep", "channels"),
    [
        (("conv1",), 4),
        (("conv2",), 8),
        (("conv1_forward", "gradient"), 4),
        (("skip",), 8),
        (("conv1", "conv2", "gradient", "skip_gradient"), 12),
        (("gradient", "skip_gradient"), 0),  # both come in backward
    ],
)
def test_what_is_kept_costs_its_channels_at_full_resolution(
    keep: tuple[Keep, ...], channels: int
) -> None:
    """conv1 has half of the level's 8 channels, conv2 and the skip have 8."""
    kept = traced_kept_bytes(prepare(keep)) - traced_kept_bytes(prepare(()))
    assert kept == channels * VOXELS * 4


def peak_bytes(options: TiledLevelsOptions, shape: tuple[int, int, int]) -> int:
    """Return the peak of live storages over a step, less what was there before."""
    network = small(options)
    images, target = torch.randn(1, 1, *shape), torch.randint(3, (1, *shape))
    with LiveBytes() as live:
        torch.autograd.backward(network.training_loss(images, target, LOSS))
    return int(live.peak_bytes)


def test_the_peak_falls_with_the_number_of_slabs() -> None:
    """With nothing kept, twice as many slabs leave less than 0.8 of what is above the rest.

    Slabs of 32, 16 and 8 slices with their halos; what does not fall is at half resolution.
    """
    peaks = [peak_bytes(TiledLevelsOptions(slabs=n, keep=()), (16, 16, 64)) for n in (2, 4, 8)]
    below = 16 * 16 * 64 // 8 * (8 + 4 + 4 + 4 + 16 + 16 + 8 + 8) * 4  # and the gradient of low
    above = [peak - below for peak in peaks]
    assert above[1] < 0.8 * above[0]
    assert above[2] < 0.8 * above[1]


def test_after_backward_nothing_stays_but_gradients() -> None:
    """Though loss and graph are still held, as a training loop holds them."""
    network = small(TiledLevelsOptions(slabs=3))
    images, target = torch.randn(1, 1, *SHAPE), torch.randint(3, (1, *SHAPE))
    with LiveBytes() as live:
        loss = network.training_loss(images, target, LOSS)
        torch.autograd.backward(loss)
        stored = live.now_bytes
    gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    assert loss.requires_grad
    # Beside them the norms' numbers; a volume of 8 channels, of half the sides, would be more.
    assert 0 <= stored - gradients < 8 * BELOW * 4


class LargestConvolution(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the largest operand or result of a convolution, in elements."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``, and look at it if it is a convolution."""
        result = func(*args, **(kwargs or {}))
        if func in (
            torch.ops.aten.convolution.default,
            torch.ops.aten.convolution_backward.default,
        ):
            results = result if isinstance(result, tuple) else (result,)
            for tensor in (*args, *results):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
        return result


def test_convolutions_of_a_512_cube_stay_under_two_to_the_31() -> None:
    """The whole skip has 64 x 512^3 elements, four times that: cuDNN and indices take no more.

    Eight slabs of 64 slices and one or two more of halo on either side: 64 channels of 68 slices.
    """
    largest = LargestConvolution()  # type: ignore[no-untyped-call]
    with FakeTensorMode(), largest:
        torch.set_default_dtype(torch.float16)
        try:
            network = FCN(block="ccblock", norm="batch_norm_leaky_relu")
        finally:
            torch.set_default_dtype(torch.float32)
        tiled = tile_levels(network, TiledLevelsOptions(slabs=8, levels=2))
        images = torch.empty(1, 1, 512, 512, 512, dtype=torch.float16)
        target = torch.zeros(1, 512, 512, 512, dtype=torch.int64)
        torch.autograd.backward(tiled.training_loss(images, target, LOSS))
    assert 64 * 512 * 512 * 64 <= largest.elements <= 64 * 512 * 512 * 68
    assert largest.elements < 2**31
