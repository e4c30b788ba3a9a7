"""Layer norm, roll, indexing, BCE and copies of operands: tensor by tensor, in order.

The rules were held against torch's CUDA build on the stand-in GPU (torch 2.11 and 2.13); the sizes
here are worked out from shapes. The program's own tensors, which come first, are left out.
"""

from __future__ import annotations

import pytest
import torch

from bench.predict.cards import find_card
from bench.predict.dense_copies import dense_copies
from bench.predict.device_sorts import radix_sort_bytes
from bench.predict.layer_norms import partial_rows
from bench.predict.traced_card import trace_for
from tests.bench.predict.fake_cuda import printed_by

_aten = torch.ops.aten

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

def new(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, device="cuda:0", dtype=dtype, requires_grad=grad)

def longs(*shape, dtype=torch.int64):
    return torch.zeros(shape, device="cuda:0", dtype=dtype)

def seen(program, *make):
    # What is allocated and, negative, released from the program's call on, in order.
    with FakeTensorMode(), Tracer("cuda") as tracer:
        tensors = [one() for one in make]
        begun = len(tracer.trace.events)
        try:
            result = program(*tensors)
        except (RuntimeError, IndexError) as error:
            return type(error).__name__
        tracer.stop()
    sizes = {e[1]: e[2] for e in tracer.trace.events if e[0] == "alloc"}
    return [sizes[e[1]] if e[0] == "alloc" else -sizes[e[1]]
            for e in tracer.trace.events[begun:] if e[0] in ("alloc", "free")]

def gradients(forward, *tensors):
    out = forward(*tensors)
    return torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.empty_like(out))

def norm(x, w, b):
    return F.layer_norm(x, w.shape, w, b)

def normed(rows, width):
    return [lambda: new(rows, width, grad=True), *[lambda: new(width, grad=True)] * 2]

def put(x, i, v):
    return torch.ops.aten._index_put_impl_(x, [i], v, True, True)

def taken(x, i):
    return x[i]

def number_at_list(x):
    x[:, [0, 2]] = 1.0

def number_at(x, i):
    x[i] = 1.0

bce = F.binary_cross_entropy_with_logits
print(json.dumps({
    "norm": seen(norm, lambda: new(200, 48), *[lambda: new(48)] * 2),
    "norm half": seen(norm, lambda: new(200, 48, dtype=torch.float16),
                      *[lambda: new(48, dtype=torch.float16)] * 2),
    "norm turned": seen(norm, lambda: new(48, 200).t(), *[lambda: new(48)] * 2),
    "norm of 48": seen(norm, lambda: new(200, 40), *[lambda: new(48)] * 2),
    "norm backward": seen(lambda *t: gradients(norm, *t), *normed(200, 48)),
    "norm backward of many rows": seen(lambda *t: gradients(norm, *t), *normed(70000, 24)),
    "norm backward, gradient turned": seen(
        lambda *t: gradients(lambda *u: norm(*u).t().contiguous(), *t), *normed(200, 48)),
    "norm of sides": seen(lambda *t: gradients(norm, *t), lambda: new(66000, 2, 8, grad=True),
                          *[lambda: new(2, 8, grad=True)] * 2),
    "roll": seen(lambda x: torch.roll(x, 1, 0), lambda: new(8, 8, 8)),
    "roll three": seen(lambda x: torch.roll(x, (1, 2, 3), (0, 1, 2)), lambda: new(8, 8, 8)),
    "roll turned": seen(lambda x: torch.roll(x, (1, 2), (0, 1)), lambda: new(8, 16).t()),
    "roll flat": seen(lambda x: torch.roll(x, 1), lambda: new(8, 16).t()),
    "roll nowhere": seen(lambda x: torch.roll(x, 1, 3), lambda: new(8, 16)),
    "roll unevenly": seen(lambda x: torch.roll(x, (1, 2), 0), lambda: new(8, 16)),
    "index": seen(taken, lambda: new(100, 3), lambda: longs(5000)),
    "index int": seen(taken, lambda: new(100, 3), lambda: longs(5000, dtype=torch.int32)),
    "index pair": seen(lambda x, i, j: x[i, j], lambda: new(100, 50),
                       lambda: longs(30, 1), lambda: longs(1, 40)),
    "index backward": seen(lambda *t: gradients(taken, *t), lambda: new(300, 3, grad=True),
                           lambda: longs(5000)),
    "index backward between": seen(
        lambda *t: gradients(lambda x, i, j: x[i, :, j], *t), lambda: new(9, 300, 7, grad=True),
        lambda: longs(5000), lambda: longs(5000)),
    "index from the host": seen(lambda x, i: x[:, i], lambda: new(9, 4, 500),
                                lambda: torch.tensor([0, 2])),
    "put a number at a list": seen(number_at_list, lambda: new(9, 4, 5)),
    "put a number": seen(number_at, lambda: new(300, 3), lambda: longs(5000)),
    "put a number at a mask": seen(number_at, lambda: new(300, 3),
                                   lambda: longs(300, 3, dtype=torch.bool)),
    "put": seen(put, lambda: new(300, 3), lambda: longs(5000), lambda: new(3)),
    "put int": seen(put, lambda: new(300, 3), lambda: longs(5000, dtype=torch.int32),
                    lambda: new(5000, 3)),
    "put turned": seen(put, lambda: new(3, 300).t(), lambda: longs(5000), lambda: new(5000, 3)),
    "put checked": seen(lambda x, i, v: x.index_put_((i,), v, True), lambda: new(300, 3),
                        lambda: longs(5000), lambda: new(1, 1, 5000, 3)),
    "put apart": seen(lambda x, i, v: x.index_put((i,), v), lambda: new(300, 3),
                      lambda: longs(5000), lambda: new(5000, 3)),
    "put a copy": seen(lambda x, i, v: x.index_put((i,), v, True), lambda: new(300, 3),
                       lambda: longs(5000), lambda: new(5000, 3)),
    "put what does not fit": seen(put, lambda: new(300, 3), lambda: longs(50), lambda: new(7, 3)),
    "put by a mask": seen(lambda x, m: x.masked_fill_(m, 1.0).index_put_((m,), x.sum(), True),
                          lambda: new(300), lambda: longs(300, dtype=torch.bool)),
    "gather backward": seen(lambda *t: gradients(lambda x, i: x.gather(0, i), *t),
                            lambda: new(1000, 3, grad=True), lambda: longs(20, 3)),
    "topk backward": seen(lambda x: gradients(lambda y: y.topk(5, 0)[0], x),
                          lambda: new(1000, 3, grad=True)),
    "bce": seen(bce, lambda: new(1000, 30), lambda: new(1000, 30)),
    "bce each": seen(lambda *t: bce(*t, reduction="none"), *[lambda: new(1000, 30)] * 2),
    "bce added up": seen(lambda *t: bce(*t, reduction="sum"), *[lambda: new(100, 3)] * 2),
    "bce weighted": seen(lambda x, y, w: bce(x, y, w, pos_weight=w, reduction="none"),
                         *[lambda: new(1000, 30)] * 2, lambda: new(30)),
    "bce backward": seen(
        lambda x, y: gradients(lambda z: bce(z, y, reduction="none"), x),
        lambda: new(1000, 30, grad=True), lambda: new(1000, 30)),
    "bce backward weighted": seen(
        lambda x, y, w: gradients(lambda z: bce(z, y, pos_weight=w, reduction="none"), x),
        lambda: new(1000, 30, grad=True), lambda: new(1000, 30), lambda: new(30)),
    "person's scatter": seen(
        lambda x: torch.autograd.grad(Own.apply(x), x, new(1000, 3)),
        lambda: new(1000, 3, grad=True)) if (Own := type("Own", (torch.autograd.Function,), {
            "forward": staticmethod(lambda ctx, x: x.clone()),
            "backward": staticmethod(lambda ctx, g: torch.zeros_like(g).scatter_add(
                0, torch.zeros((1, 3), dtype=torch.int64, device=g.device), g)),
        })) else None,
    "upsampled": seen(lambda x: torch.autograd.grad(
        F.interpolate(x, scale_factor=2, mode="trilinear").sum(), x),
        lambda: new(1, 4, 8, 8, 8, grad=True)),
}), flush=True)
import os
os._exit(0)
"""

_Seen = dict[str, list[int] | str]


@pytest.fixture(scope="module")
def seen() -> _Seen:
    found: _Seen = printed_by(_PROGRAMS)
    return found


# -- layer norm -----------------------------------------------------------------------------------

_X, _MEANS, _WEIGHT = 4 * 200 * 48, 4 * 200, 4 * 48  # of 200 rows of 48
_LONG, _ROWS, _NARROW = 4 * 70_000 * 24, 4 * 70_000, 4 * 24
_PARTS = 4 * 24 * 2188  # 70,000 rows in blocks of 32


@pytest.mark.parametrize(
    ("program", "sizes"),
    [
        ("norm", [_X, _MEANS, _MEANS, -_MEANS, -_MEANS]),
        ("norm half", [_X // 2, _MEANS, _MEANS, -_MEANS, -_MEANS]),
        # The copy is taken before the results and goes once they are there.
        ("norm turned", [_X, _X, _MEANS, _MEANS, -_X, -_MEANS, -_MEANS]),
        # Forward, the gradient that is given, the results; then forward goes.
        (
            "norm backward",
            [_X, _MEANS, _MEANS, _X, _X, _WEIGHT, _WEIGHT, -_MEANS, -_MEANS, -_X, -_X],
        ),
        # The result turned, its gradient, and that made dense once backward's results are there.
        (
            "norm backward, gradient turned",
            [
                *(_X, _MEANS, _MEANS, _X, -_X, _X, _X, _WEIGHT, _WEIGHT, _X, -_X),
                *(-_MEANS, -_MEANS, -_X, -_X),
            ],
        ),
        # Both gradients in parts; a sum of parts takes the place of the gradient made first.
        (
            "norm backward of many rows",
            [
                *(_LONG, _ROWS, _ROWS, _LONG, _LONG, _NARROW, _NARROW, _PARTS, _PARTS),
                *(_NARROW, -_NARROW, _NARROW, -_NARROW, -_PARTS, -_PARTS),
                *(-_ROWS, -_ROWS, -_LONG, -_LONG),
            ],
        ),
    ],
)
def test_layer_norm_takes_what_torch_takes(seen: _Seen, program: str, sizes: list[int]) -> None:
    assert seen[program] == sizes


def test_a_norm_over_two_sides_adds_up_over_both(seen: _Seen) -> None:
    sizes = seen["norm of sides"]
    assert isinstance(sizes, list)
    assert sizes.count(4 * 16 * 2063) == 2  # 66,000 rows in blocks of 32, each 2 x 8 wide


@pytest.mark.parametrize(
    ("card", "rows", "width", "parts"),
    [
        ("h100-80gb", 64 * 1024, 24, 0),  # not more than that many rows
        ("h100-80gb", 64 * 1024 + 1, 24, 2049),
        ("h100-80gb", 3_000_000, 24, 32 * 1024),  # no more blocks than that
        ("h100-80gb", 600_000, 96, 32 * 1024 // 3),  # by three columns of blocks
        ("h100-80gb", 131_072, 2111, 32 * 1024 // 66),  # 65 times 32 and more: below 132 / 2
        ("h100-80gb", 131_072, 2112, 0),
        ("v100-32gb", 131_072, 1279, 32 * 1024 // 40),  # 80 multiprocessors
        ("v100-32gb", 131_072, 1280, 0),
    ],
)
def test_two_passes_are_taken_where_the_width_leaves_half_of_the_card_idle(
    card: str, rows: int, width: int, parts: int
) -> None:
    trace_for(find_card(card))
    assert partial_rows(rows, width) == parts


# -- roll -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "sizes"),
    [
        ("roll", [2048]),
        ("roll three", [2048, 2048, 2048, -2048, -2048]),  # all three are there at once
        ("roll turned", [512, 512, -512, 512, -512]),  # the copy goes once the first is done
        ("roll flat", [512, 512, -512]),
        ("roll nowhere", "IndexError"),
        ("roll unevenly", "RuntimeError"),
    ],
)
def test_each_side_is_rolled_into_a_tensor_of_its_own(
    seen: _Seen, program: str, sizes: list[int] | str
) -> None:
    assert seen[program] == sizes


# -- indices --------------------------------------------------------------------------------------

_INDEX = 8 * 5000
_TABLE = 4 * 300 * 3
_FOUND = 4 * 5000 * 3
# Keys to 299 in two passes of 8 bits: counts, tiles of 4,608, two copies of 40,000 B (40,192 with
# the rounding to 256), counters, and 255 B to round the whole.
_ROOM = 2 * 256 * 8 + 2 * 256 * 4 + 2 * 40_192 + 256 + 255
_SORTED = [_INDEX, _INDEX, _INDEX, _ROOM, -_ROOM, -_INDEX, -_INDEX, -_INDEX]
_LINEAR = [_INDEX, _INDEX, -_INDEX]  # the remainder, times the stride


@pytest.mark.parametrize(
    ("program", "sizes"),
    [
        ("index", [_FOUND]),
        ("index int", [_INDEX, _FOUND, -_INDEX]),
        ("index pair", [8 * 1200, 8 * 1200, 4 * 1200, -8 * 1200, -8 * 1200]),
        (
            "index backward",
            [_FOUND, _FOUND, _TABLE, *_LINEAR, *_SORTED, -_INDEX, -_FOUND, -_FOUND],
        ),
        # Indices and a number come from the host: two int64, one float32.
        ("index from the host", [16, 4 * 9 * 2 * 500, -16]),
        ("put a number at a list", [16, 4, -4, -16]),
        ("put a number", [4, -4]),
        ("put a number at a mask", [4, -4]),
        ("put", [*_LINEAR, _FOUND, *_SORTED, -_FOUND, -_INDEX]),
        ("put int", [_INDEX, *_LINEAR, -_INDEX, *_SORTED, -_INDEX]),
        ("put turned", [_TABLE, *_LINEAR, *_SORTED, -_INDEX, -_TABLE]),
        ("put checked", [8, 8, -8, -8, *_LINEAR, *_SORTED, -_INDEX]),
        ("put a copy", [_TABLE, 8, 8, -8, -8, *_LINEAR, *_SORTED, -_INDEX]),
        ("put apart", [_TABLE]),
        ("put what does not fit", "RuntimeError"),
        ("put by a mask", [4, -4]),
    ],
)
def test_what_is_added_up_at_indices_is_sorted_first(
    seen: _Seen, program: str, sizes: list[int] | str
) -> None:
    assert seen[program] == sizes


def test_indices_with_a_side_between_them_are_brought_together(seen: _Seen) -> None:
    found, table = 4 * 5000 * 300, 4 * 9 * 300 * 7
    room = 256 * 8 + 2 * 256 * 4 + 256 + 255  # keys to 62: one pass, which needs no copies
    assert seen["index backward between"] == [
        *(found, found, table, *_LINEAR, *_LINEAR, -_INDEX, table),
        *(_INDEX, _INDEX, _INDEX, room, -room, -_INDEX, -_INDEX, -_INDEX),
        *(-table, -_INDEX, -found, -found),
    ]


@pytest.mark.parametrize(
    ("card", "pairs", "largest", "size"),
    [
        # Seen on torch 2.11 and 2.13.
        ("h200-141gb", 2304, 199, 1),
        ("h200-141gb", 2432, 199, 3_583),
        ("h200-141gb", 2432, 2196, 44_543),
        ("h200-141gb", 10_000_000, 199, 2_225_663),
        ("h200-141gb", 10_000_000, 69_999, 162_229_759),
        ("h200-141gb", 10_000_000, 19_999_999, 162_231_807),
        ("b200-180gb", 117_649, 256, 1_913_855),
        ("a100-80gb", 117_649, 256, 1_918_975),
        ("a100-80gb", 117_649, 255, 34_303),
        ("t4-16gb", 117_649, 256, 1_930_239),
        ("t4-16gb", 1, 0, 1),
    ],
)
def test_the_radix_sort_asks_for_the_room_that_it_was_seen_to_ask_for(
    card: str, pairs: int, largest: int, size: int
) -> None:
    trace_for(find_card(card))
    assert radix_sort_bytes(pairs, largest) == size


# -- formulas that go on in place -----------------------------------------------------------------

_N = 4 * 1000 * 30


@pytest.mark.parametrize(
    ("program", "sizes"),
    [
        # Picked, the gradient given, and the zeros that it is added into: nothing else.
        ("gather backward", [240, 240, 12_000, -240, -240]),
        ("topk backward", [60, 120, 60, 12_000, -120, -60, -60]),
        # A person's own backward makes what it says.
        ("person's scatter", [*[12_000] * 3, 24, 12_000, -12_000, -24, -12_000, -12_000]),
        ("bce", [_N, _N, 4, -_N, -_N]),
        ("bce each", [_N, _N, -_N]),
        ("bce added up", [1200, 1200, 4, -1200, -1200]),
        ("bce weighted", [_N, 120, _N, -120, -_N, _N, -_N]),
        # The loss and its gradient; the sigmoid becomes the input's gradient.
        ("bce backward", [_N, _N, -_N, _N, _N, -_N, -_N]),
        # Backward: the weighted target, what the sigmoid is multiplied into, the sigmoid.
        (
            "bce backward weighted",
            [*(_N, 120, _N, -120, -_N, _N, -_N), *[_N] * 4, *[-_N] * 4],
        ),
    ],
)
def test_autograds_formulas_write_over_what_they_made(
    seen: _Seen, program: str, sizes: list[int]
) -> None:
    assert seen[program] == sizes


# -- copies of operands ---------------------------------------------------------------------------


def test_a_gradient_that_is_spread_is_copied_after_the_result(seen: _Seen) -> None:
    # Upsampled, the loss; it goes, the loss's gradient, the result, the spread gradient's copy.
    assert seen["upsampled"] == [65_536, 4, -65_536, 4, 8192, 65_536, -65_536, -4, -4]


class _OnCuda(torch.Tensor):
    """A tensor of sizes alone that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def _cuda(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta").as_subclass(_OnCuda)


@pytest.mark.parametrize(
    ("operator", "args", "sizes"),
    [
        (_aten.mm, lambda: (_cuda(8, 4), _cuda(4, 2)), ()),
        (_aten.mm, lambda: (_cuda(4, 8).t(), _cuda(4, 9)[:, :2]), ()),
        (_aten.mm, lambda: (_cuda(1).expand(8, 4), _cuda(4, 2)), (128,)),
        (_aten.bmm, lambda: (_cuda(3, 8, 4, 2)[..., 0], _cuda(3, 2, 4).mT), (384,)),
        (_aten.addmm, lambda: (_cuda(1).expand(2), _cuda(8, 4), _cuda(4, 4)[:, ::2]), (32,)),
        (_aten.max_pool3d_with_indices, lambda: (_cuda(1, 2, 4, 4, 8).mT, [2]), (1024,)),
        (
            _aten.max_pool3d_with_indices,
            lambda: (_cuda(1, 2, 4, 4, 4).to(memory_format=torch.channels_last_3d), [2]),
            (),
        ),
        (
            _aten.avg_pool3d,
            lambda: (_cuda(1, 2, 4, 4, 4).to(memory_format=torch.channels_last_3d), [2]),
            (512,),
        ),
        (
            _aten.avg_pool2d_backward,
            lambda: (_cuda(1).expand(1, 2, 2, 2), _cuda(1, 2, 4, 8).mT, [2]),
            (256, 32),
        ),
        (_aten.avg_pool3d, lambda: (torch.empty(2, 4, 4, 8).mT, [2]), ()),  # on the CPU
        (_aten.relu, lambda: (_cuda(1).expand(8, 4),), ()),
        (_aten.mm, lambda: (_cuda(1).expand(8, 0), _cuda(0, 2)), ()),
    ],
)
def test_operands_that_kernels_cannot_read_are_copied(
    operator: object, args: object, sizes: tuple[int, ...]
) -> None:
    assert callable(args)
    assert dense_copies(operator, args()) == sizes
