"""Offloading on CUDA: equal gradients to the bit, and the bytes that the card no longer holds."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.streams import CudaStreams, streams_for

pytestmark = pytest.mark.gpu

MIB = 2**20
SIDE = 64  # 8 channels of 64 cubed in float32: 8 MiB a block


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv3d(8, 8, 3, padding=1, bias=False) for _ in range(6))).cuda()


def step(model: nn.Module, x: Tensor, scope: AbstractContextManager[None]) -> int:
    """Run a step; return what the card held after the forward above what it held before."""
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    with scope:
        y = model(x)
    held: int = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
    torch.autograd.backward(y.square().mean())
    return held


@pytest.mark.needs_kernels
@pytest.mark.parametrize("in_flight_bytes", [0, 20 * MIB, 2**30])
def test_gradients_are_equal_to_the_bit_and_the_card_keeps_what_is_in_flight(
    in_flight_bytes: int,
) -> None:
    torch.backends.cudnn.deterministic = True
    plain, x = chain(), torch.randn(1, 8, SIDE, SIDE, SIDE, device="cuda")
    moved = copy.deepcopy(plain)
    streams = streams_for(x.device)
    assert isinstance(streams, CudaStreams)
    block = x.nbytes
    for _ in range(3):  # pinned buffers and blocks are used again
        plain.zero_grad()
        moved.zero_grad()
        assert step(plain, x, nullcontext()) == 6 * block  # 5 results and the output
        held = step(moved, x, memsave.offload(moved, in_flight_bytes=in_flight_bytes))
        # 5 results beside the input are moved; up to as many as fit the bound are still here.
        assert held == block * (1 + min(5, in_flight_bytes // block))
        for one, other in zip(plain.parameters(), moved.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    assert streams.host.now_bytes == 0
    assert streams.host.peak_bytes >= 6 * block


def test_compression_runs_on_the_card() -> None:
    model, x = chain(), torch.randn(1, 8, SIDE, SIDE, SIDE, device="cuda")
    held = step(model, x, memsave.compress_activations(model))
    values = x.numel()
    assert held == 6 * (values + 4 * 8) + x.nbytes  # 5 results and the input in int8, the output
