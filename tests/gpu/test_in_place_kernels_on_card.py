"""The in-place norms' kernels on CUDA: their peak bytes, and more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from memsave import InPlaceABN, InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.kernels.tiles import collapse, tile

pytestmark = pytest.mark.gpu

TYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS: dict[str, tuple[int | None, Callable[[], nn.Module]]] = {
    "abn": (None, lambda: InPlaceABN(64)),
    "group": (8, lambda: InPlaceGroupNorm(8, 64)),
    "instance": (64, lambda: InPlaceInstanceNorm(64, affine=True)),
}


def _requested() -> tuple[int, int]:
    """Bytes requested now and at the peak."""
    counts = torch.cuda.memory_stats()
    return counts["requested_bytes.all.current"], counts["requested_bytes.all.peak"]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward_take_partial_sums_and_nothing_of_an_activations_size(
    name: str, dtype: torch.dtype, last: bool
) -> None:
    groups, make = LAYERS[name]
    norm = make().cuda()
    layout = torch.channels_last_3d if last else torch.contiguous_format
    x = torch.randn(2, 64, 24, 24, 24, device="cuda", dtype=dtype).to(memory_format=layout)
    x.requires_grad_()
    dz = torch.randn_like(x)
    norm(x * 1).backward(dz)  # warm-up: compiled kernels, gradients that stay
    at = collapse(x)
    assert at is not None
    cut = tile(x.shape, groups, at, at)

    y = x * 1
    before, _ = _requested()
    torch.cuda.reset_peak_memory_stats()
    z = norm(y)
    _, peak = _requested()
    assert peak - before == 4 * (cut.statistics + cut.partials + cut.statistics)

    x.grad = None
    before, _ = _requested()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.backward(z, dz, inputs=list(norm.parameters()))
    _, peak = _requested()
    assert peak - before == 4 * (2 * 64 + cut.partials + 2 * cut.statistics)


@pytest.mark.needs_kernels
def test_more_elements_than_32_bits_count() -> None:
    """The last channel lies past 2^31 elements; it must come out as it does alone."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    torch.manual_seed(0)
    side = 2**29 + 3
    x = torch.empty(1, 5, side, device="cuda", dtype=torch.float16).normal_()
    last = x[:, 4:].clone()
    z = InPlaceABN(5).cuda()(x)
    expected = InPlaceABN(1).cuda()(last)
    torch.testing.assert_close(z[:, 4:], expected, rtol=2e-3, atol=2e-6)


@pytest.mark.needs_kernels
def test_a_constant_channel_and_a_huge_mean_come_out() -> None:
    """Mean 1e6, spread 8: float32 holds the values to 0.06, so xhat to 1e-2."""
    x = torch.randn(2, 2, 40, 40, 40, device="cuda") * 8 + 1e6
    x[:, 1] = 7.25
    exact = x[:, 0].double()
    var, mean = torch.var_mean(exact, correction=0)
    z = InPlaceABN(2, activation="identity").cuda()(x)
    assert (z[:, 1] == 0).all()
    expected = (exact - mean) / var.sqrt()
    torch.testing.assert_close(z[:, 0].double(), expected, rtol=1e-3, atol=1.5e-2)
