"""What operators take inside: sizes as torch's CUDA build was seen to take them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.predict.reduction_buffers import reduction_buffers
from bench.predict.shim import ShimUnavailable, build_shim
from bench.predict.tracer import Tracer


def _rows(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_a_sum_over_rows_leaves_a_part_for_each_lane_of_sixteen_blocks() -> None:
    # 1024 sums of 1024 rows: 4 bytes, 16 blocks for each sum, 32 threads of 4 lanes across; and a
    # counter of 4 bytes for each of the 8 columns of 32 x 4 sums.
    parts = 4 * 1024 * 16 * 32 * 4
    assert reduction_buffers(_rows(1024, 1024), (0,), 4) == (parts, 4 * 8)


def test_a_sum_over_the_sides_of_a_volume_leaves_a_part_for_each_block() -> None:
    # One sum of 8 x 4096 x 256 numbers, by 512 threads: a block for each of the 132 x 4 rooms.
    assert reduction_buffers(_rows(8, 4096, 256), (), 4) == (4 * 132 * 4, 4)


@pytest.mark.parametrize("shape", [(1024, 8), (16, 1024), (1, 1024), (0, 4)])
def test_a_sum_that_a_block_can_do_leaves_nothing(shape: tuple[int, int]) -> None:
    assert reduction_buffers(_rows(*shape), (1 if shape[0] == 1024 else 0,), 4) == ()


def test_a_transposed_matrix_is_summed_as_it_lies() -> None:
    turned = _rows(1024, 1024).T
    assert reduction_buffers(turned, (1,), 4) == reduction_buffers(_rows(1024, 1024), (0,), 4)
    assert reduction_buffers(turned, (0,), 4) == ()


def test_what_is_kept_goes_by_how_the_result_lies() -> None:
    # Seen: none for a reversed (8, 4096, 256), whose 256 kept are far apart in the input.
    assert reduction_buffers(_rows(256, 4096, 8).permute(2, 1, 0), (1,), 4) == ()


_SILU_BACKWARD = """
from bench.predict.shim import build_shim, load_shim
load_shim(build_shim())
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from bench.predict.cuda_kernels import register_cuda_kernels
from bench.predict.tracer import Tracer
register_cuda_kernels()
register_cuda_kernels()
with FakeTensorMode(), Tracer("cuda") as tracer:
    x = torch.empty(64, 64, device="cuda:0", requires_grad=True)
    y = torch.nn.functional.silu(x)
    y.backward(torch.empty_like(y))
    print(sum(event[0] == "alloc" for event in tracer.trace.events))
"""


def test_silu_backward_is_one_kernel_with_one_result() -> None:
    try:
        build_shim()
    except ShimUnavailable as error:
        pytest.skip(f"no CUDA shim here: {error}")
    done = subprocess.run(
        [sys.executable, "-c", _SILU_BACKWARD],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # x, silu's result, its gradient and x's: the formula would take five more.
    assert done.stdout.strip() == "4"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "loss",
    ["binary_cross_entropy", "mse_loss", "smooth_l1_loss", "soft_margin_loss", "huber_loss"],
)
def test_a_reduced_loss_holds_what_it_holds_in_torch(loss: str, reduction: str) -> None:
    """The judge is torch, asked for the storage behind a real loss."""
    compute = getattr(torch.nn.functional, loss)
    numbers = torch.full((10, 100), 0.5)
    really = compute(numbers, numbers, reduction=reduction).untyped_storage().nbytes()

    with FakeTensorMode(), Tracer("cpu") as tracer:
        fake = torch.empty(10, 100)
        result = compute(fake, fake, reduction=reduction)
        identity = tracer._live[result.untyped_storage()._cdata][1]

    (size,) = (e[2] for e in tracer.trace.events if e[0] == "alloc" and e[1] == identity)
    assert size == really
