"""Grids, unfolding, distances and upsampling: tensor by tensor, in order, and how results lie.

Held against torch's CUDA build on the stand-in GPU (torch 2.11 and 2.13); the sizes here are worked
out from shapes. The program's own tensors, which come first, are left out.
"""

from __future__ import annotations

import pytest

from tests.bench.predict.fake_cuda import printed_by

_PROGRAMS = """
import json
from bench.predict.shim import build_shim, load_shim
load_shim(build_shim())
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from bench.predict.cuda_kernels import register_cuda_kernels
from bench.predict.tracer import Tracer
register_cuda_kernels()
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d

def new(*shape, dtype=torch.float32, grad=False, lying=torch.contiguous_format):
    made = torch.empty(shape, device="cuda:0", dtype=dtype, memory_format=lying)
    return made.requires_grad_(grad)

def seen(program, *make):
    with FakeTensorMode(), Tracer("cuda") as tracer:
        tensors = [one() for one in make]
        begun = len(tracer.trace.events)
        try:
            result = program(*tensors)
        except RuntimeError as error:
            return type(error).__name__
        if isinstance(result, bool):
            return result
        tracer.stop()
    sizes = {e[1]: e[2] for e in tracer.trace.events if e[0] == "alloc"}
    return [e[0] if e[0] == "cublas" else sizes[e[1]] if e[0] == "alloc" else -sizes[e[1]]
            for e in tracer.trace.events[begun:] if e[0] in ("alloc", "free", "cublas")]

def gradients(forward, *tensors):
    out = forward(*tensors)
    return torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.empty_like(out))

def lies(forward, x, like):
    out = forward(x)
    gradient, = torch.autograd.grad(out, x, torch.empty_like(out))
    return out.is_contiguous(memory_format=like) and gradient.is_contiguous(memory_format=like)

def sampled(x, grid):
    return F.grid_sample(x, grid, align_corners=True)

def up(x, mode="trilinear"):
    return F.interpolate(x, scale_factor=2, mode=mode)

image, grid = (lambda: new(2, 3, 8, 8, grad=True)), (lambda: new(2, 9, 9, 2, grad=True))
patches = lambda x: F.unfold(x, 3, padding=1)
print(json.dumps({
    "grid": seen(lambda t: F.affine_grid(t, (2, 1, 16, 16, 16), align_corners=True),
                 lambda: new(2, 3, 4)),
    "grid apart": seen(lambda t: F.affine_grid(t, (2, 1, 16, 20), align_corners=False),
                       lambda: new(2, 2, 3)),
    "grid of one": seen(lambda t: F.affine_grid(t, (2, 1, 16, 1), align_corners=False),
                        lambda: new(2, 2, 3)),
    "sampled": seen(lambda *t: gradients(sampled, *t), image, grid),
    "sampled turned": seen(sampled, lambda: new(2, 3, 8, 8).mT,
                           lambda: new(2, 9, 9, 2).transpose(1, 2)),
    "sampled spread": seen(sampled, lambda: new(1).expand(2, 3, 8, 8), lambda: new(2, 9, 9, 2)),
    "sampled half": seen(sampled, lambda: new(2, 3, 8, 8, dtype=torch.float16),
                         lambda: new(2, 9, 9, 2, dtype=torch.float16)),
    "unfold": seen(lambda x: gradients(patches, x), lambda: new(2, 8, 32, 32, grad=True)),
    "unfold turned": seen(patches, lambda: new(2, 8, 32, 32).mT),
    "unfold apart": seen(lambda x: F.unfold(x, 2, stride=3), lambda: new(2, 8, 32, 32)),
    "unfold nothing": seen(lambda x: F.unfold(x, 2), lambda: new(0, 3, 8, 8)),
    "unfold too little": seen(lambda x: F.unfold(x, 5), lambda: new(2, 3, 2, 2)),
    "fold over": seen(lambda x: F.fold(x, (32, 32), 3, padding=1), lambda: new(2, 72, 1024)),
    "distances": seen(torch.cdist, lambda: new(64, 16), lambda: new(48, 16)),
    "distances of batches": seen(torch.cdist, lambda: new(2, 64, 16), lambda: new(2, 48, 16)),
    "distances half": seen(torch.cdist, lambda: new(64, 16, dtype=torch.float16),
                           lambda: new(48, 16, dtype=torch.float16)),
    "streets": seen(lambda *t: gradients(lambda x, y: torch.cdist(x, y, p=1), *t),
                    lambda: new(64, 16, grad=True), lambda: new(48, 16)),
    "trilinear lies": seen(lambda x: lies(up, x, LAST_3D),
                           lambda: new(2, 3, 8, 8, 8, lying=LAST_3D, grad=True)),
    "bilinear lies": seen(lambda x: lies(lambda y: up(y, "bilinear"), x, LAST),
                          lambda: new(2, 3, 8, 8, lying=LAST, grad=True)),
    "trilinear half": seen(lambda x: up(x).dtype == torch.float16,
                           lambda: new(2, 3, 8, 8, 8, dtype=torch.float16)),
    "trilinear backward": seen(lambda x: gradients(up, x),
                               lambda: new(2, 3, 8, 8, 8, lying=LAST_3D, grad=True)),
    "trilinear dense": seen(lambda x: gradients(up, x), lambda: new(2, 3, 8, 8, 8, grad=True)),
    "nearest": seen(lambda x: up(x, "nearest"), lambda: new(2, 3, 8, 8, 8, lying=LAST_3D)),
    "nearest dense": seen(lambda x: up(x, "nearest"), lambda: new(2, 3, 8, 8, 8)),
    "into what is there": seen(
        lambda x, y: torch.ops.aten.im2col.out(x, [2, 2], [1, 1], [0, 0], [1, 1], out=y),
        lambda: new(2, 3, 8, 8), lambda: new(2, 12, 49)),
    "norm into what is there": seen(
        lambda x, w, y, m: torch.ops.aten.native_layer_norm.out(
            x, [8], w, w, 1e-5, out0=y, out1=m, out2=m.clone()),
        lambda: new(20, 8), lambda: new(8), lambda: new(20, 8), lambda: new(20, 1)),
    "on the host": seen(lambda x: up(x @ x), lambda: torch.empty(1, 1, 4, 4, 4)),
}), flush=True)
import os
os._exit(0)
"""

_Seen = dict[str, "list[int | str] | bool | str"]


@pytest.fixture(scope="module")
def seen() -> _Seen:
    found: _Seen = printed_by(_PROGRAMS)
    return found


_BASE = 2 * 16**3 * 4 * 4  # of two grids, with a one beside each point's three coordinates
_POINTS = 2 * 16**3 * 3 * 4
_IMAGE, _GRID, _OUT = 4 * 2 * 3 * 64, 4 * 2 * 81 * 2, 4 * 2 * 3 * 81


@pytest.mark.parametrize(
    ("program", "sizes"),
    [
        ("grid", [_BASE, *[64, -64] * 3, _POINTS, "cublas", -_BASE]),
        # Each side's line is scaled in two steps.
        (
            "grid apart",
            [
                *(7680, 80, 80, -80, 80, -80, -80, 64, 64, -64, 64, -64, -64),
                *(5120, "cublas", -7680),
            ],
        ),
        ("grid of one", [384, 4, -4, 64, 64, -64, 64, -64, -64, 256, "cublas", -384]),
        ("sampled", [_OUT, _OUT, _IMAGE, _GRID, -_OUT, -_OUT]),
        ("sampled turned", [_GRID, _OUT, -_GRID]),  # the image is read as it lies
        ("sampled spread", [_IMAGE, _OUT, -_IMAGE]),
        ("sampled half", [_OUT // 2]),
    ],
)
def test_grids_take_their_base_and_cudnn_samples_without_a_workspace(
    seen: _Seen, program: str, sizes: list[int | str]
) -> None:
    assert seen[program] == sizes


_PLANES, _PATCHES = 4 * 2 * 8 * 32 * 32, 4 * 2 * 72 * 1024


@pytest.mark.parametrize(
    ("program", "sizes"),
    [
        # As large as the input, then as the result; the gradient keeps the patches' size.
        ("unfold", [_PLANES, _PATCHES, -_PLANES, _PATCHES, _PATCHES, -_PATCHES, -_PATCHES]),
        ("unfold turned", [_PLANES, _PLANES, _PATCHES, -_PLANES, -_PLANES]),
        ("unfold apart", [_PLANES]),
        ("fold over", [_PATCHES]),
        ("unfold nothing", []),
        ("unfold too little", "RuntimeError"),
    ],
)
def test_patches_begin_as_large_as_what_they_are_made_of(
    seen: _Seen, program: str, sizes: list[int | str] | str
) -> None:
    assert seen[program] == sizes


@pytest.mark.parametrize(
    ("program", "batch", "item"),
    [("distances", 1, 4), ("distances of batches", 2, 4), ("distances half", 1, 2)],
)
def test_distances_are_a_product_of_points_joined_with_their_squares(
    seen: _Seen, program: str, batch: int, item: int
) -> None:
    first, second, one, other = (batch * item * n for n in (64 * 16, 48 * 16, 64, 48))
    rows, columns, product = (batch * item * n for n in (64 * 18, 48 * 18, 64 * 48))
    taken = [
        *(first, one, -first, one, second, other, -second, other),
        *(first, rows, -first, columns, product, "cublas"),
    ]
    found = seen[program]
    assert isinstance(found, list)
    assert found[: len(taken)] == taken
    # All but the product goes at one moment, in whatever order.
    assert sorted(map(int, found[len(taken) :])) == sorted(
        [-rows, -columns, -one, -one, -other, -other]
    )


def test_the_gradient_of_other_distances_takes_a_part_for_each_pair(seen: _Seen) -> None:
    found = seen["streets"]
    assert isinstance(found, list)
    parts = 4 * 64 * 48 * 16
    assert found[:5] == [4 * 64 * 48, 4 * 64 * 48, 4 * 64 * 16, parts, -parts]


@pytest.mark.parametrize("program", ["trilinear lies", "bilinear lies", "trilinear half"])
def test_what_is_upsampled_lies_and_counts_as_its_input_with_few_channels_too(
    seen: _Seen, program: str
) -> None:
    assert seen[program] is True


_SMALL, _LARGE = 4 * 2 * 3 * 8**3, 4 * 2 * 3 * 16**3


@pytest.mark.parametrize(
    ("program", "sizes"),
    [
        # Forward, the gradient that is given, the result, dense copies of both.
        (
            "trilinear backward",
            [_LARGE, _LARGE, _SMALL, _LARGE, _SMALL, -_SMALL, -_LARGE, -_LARGE, -_LARGE],
        ),
        ("trilinear dense", [_LARGE, _LARGE, _SMALL, -_LARGE, -_LARGE]),
        ("nearest", [_LARGE, _LARGE, _SMALL, -_SMALL, -_LARGE]),
        ("nearest dense", [_LARGE]),
        ("on the host", []),
    ],
)
def test_volumes_that_do_not_lie_dense_are_upsampled_in_copies(
    seen: _Seen, program: str, sizes: list[int]
) -> None:
    assert seen[program] == sizes


@pytest.mark.parametrize(
    ("program", "sizes"), [("into what is there", []), ("norm into what is there", [80])]
)
def test_a_followed_operator_may_be_given_its_results(
    seen: _Seen, program: str, sizes: list[int]
) -> None:
    found = seen[program]
    assert isinstance(found, list)
    assert [size for size in found if isinstance(size, int) and size > 0] == sizes
