"""Attention: which kernel a card takes, and what it holds, as torch's CUDA build was seen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from bench.errors import MembenchError
from bench.predict.attention import key_splits, workspace_bytes
from bench.predict.cards import Card, all_cards, find_card
from bench.predict.reduction_buffers import reduction_buffers
from bench.predict.shim import ShimUnavailable, build_shim
from bench.predict.traced_card import multiprocessors, resident_threads, trace_for


@pytest.fixture(autouse=True)
def _no_card_after() -> Iterator[None]:
    yield
    trace_for()


def _workspace(card: str, width: int, dtype: torch.dtype, heads: int = 4, tokens: int = 200) -> int:
    trace_for(find_card(card))
    one = torch.empty(2, heads, tokens, width, device="meta", dtype=dtype)
    return workspace_bytes(one, one, one)


# Each figure was seen on torch 2.13, for 2 x 4 heads of 200 tokens.
@pytest.mark.parametrize(
    ("card", "width", "dtype", "seen"),
    [
        ("a100-80gb", 64, torch.float32, 524_800),
        ("a100-80gb", 128, torch.float32, 1_049_088),
        ("a100-80gb", 256, torch.float32, 2_098_176),
        ("a100-80gb", 128, torch.float16, 1_048_832),
        ("a100-80gb", 160, torch.float16, 5_767_936),
        ("v100-32gb", 128, torch.float32, 1_049_600),
        ("v100-32gb", 128, torch.float16, 1_049_088),
        ("rtx3090-24gb", 96, torch.float16, 1_049_088),
        ("rtx3090-24gb", 160, torch.float16, 5_767_936),
        ("t4-16gb", 160, torch.float16, 5_767_936),
    ],
)
def test_the_memory_efficient_backward_adds_up_in_tiles(
    card: str, width: int, dtype: torch.dtype, seen: int
) -> None:
    assert _workspace(card, width, dtype) == seen


def test_keys_are_split_no_further_where_there_are_200_heads() -> None:
    # 1,024 heads of 256 tokens: 2 x 3 tiles of 128 x 64, and one part of 64 keys, twice 256 wide.
    trace_for(find_card("a100-80gb"))
    one = torch.empty(64, 16, 256, 160, device="meta", dtype=torch.float16)
    assert workspace_bytes(one, one, one) == 1024 * (6 * (16 + 128 * 64 * 4) + 64 * 512 * 4)


def test_before_volta_float32_is_added_up_in_the_result() -> None:
    assert _workspace("p100-16gb", 64, torch.float32) == 0


@pytest.mark.parametrize(("width", "splits"), [(64, 1), (72, 2), (160, 4), (256, 4)])
def test_flash_splits_the_keys_of_few_heads(width: int, splits: int) -> None:
    trace_for(find_card("a100-80gb"))
    assert key_splits(8, 200, 200, width) == splits
    assert key_splits(1024, 200, 200, width) == 1


def test_reductions_are_laid_out_for_the_card_that_is_traced_for() -> None:
    source = torch.empty(8, 4096, 256, device="meta")
    trace_for(find_card("v100-32gb"))
    assert (multiprocessors(), resident_threads()) == (80, 2048)
    assert reduction_buffers(source, (), 4) == (4 * 80 * 4, 4)  # of 512 threads 4 fit
    trace_for(find_card("rtx3090-24gb"))
    assert (multiprocessors(), resident_threads()) == (82, 1536)
    assert reduction_buffers(source, (), 4) == (4 * 82 * 3, 4)
    trace_for(find_card("t4-16gb"))
    assert (multiprocessors(), resident_threads()) == (40, 1024)


def test_every_card_says_how_many_multiprocessors_its_context_is_reckoned_from() -> None:
    for card in all_cards().values():
        if "each of the" in card.context_source:
            assert f"each of the {card.multiprocessors} multiprocessors" in card.context_source


def test_a_card_without_the_number_has_an_h100s_and_the_same_digest() -> None:
    data = find_card("v100-32gb").to_dict()
    del data["multiprocessors"]
    card = Card.from_dict(data)
    assert card.multiprocessors == 132
    assert card.digest() == find_card("v100-32gb").digest()


@pytest.mark.parametrize("number", [0, -1, True, 1.5, "80", None])
def test_a_card_with_no_multiprocessors_is_refused(number: object) -> None:
    data = {**find_card("v100-32gb").to_dict(), "multiprocessors": number}
    with pytest.raises(MembenchError, match="'multiprocessors' must be a whole number from 1 on"):
        Card.from_dict(data)


_CHOICES = """
import json
from bench.predict.shim import build_shim, load_shim
load_shim(build_shim())
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from bench.predict.cards import find_card
from bench.predict.cuda_kernels import register_cuda_kernels
from bench.predict.traced_card import trace_for
from bench.predict.tracer import Tracer
register_cuda_kernels()

def attended(card, dtype, width=64, keys=200, grad=True, mask=False, **options):
    trace_for(find_card(card))
    with FakeTensorMode(), Tracer("cuda") as tracer:
        sides = (200, keys, keys)
        q, k, v = (torch.empty(2, 4, n, width, device="cuda:0", dtype=dtype, requires_grad=grad)
                   for n in sides)
        biases = torch.empty(200, keys, device="cuda:0", dtype=dtype) if mask else None
        out = F.scaled_dot_product_attention(q, k, v, biases, **options)
        if grad:
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
        tracer.stop()
    trace = tracer.trace
    operators = [site.operator for site in trace.sites]
    names = [name for name in operators if "scaled_dot" in name or "safe" in name]
    sizes = [e[2] for e in trace.events if e[0] == "alloc"][3:]
    name = names[0].removeprefix("aten._").removesuffix(".default")
    return [name, sizes, sorted(trace.estimated)]

f, h, b = torch.float32, torch.float16, torch.bfloat16
print(json.dumps({
    "single": attended("a100-80gb", f),
    "half": attended("a100-80gb", h),
    "wide": attended("a100-80gb", h, 160),
    "masked": attended("a100-80gb", h, mask=True),
    "odd": attended("a100-80gb", f, 62),
    "oblong causal": attended("a100-80gb", h, keys=300, is_causal=True),
    "old half": attended("v100-32gb", h),
    "old brain": attended("v100-32gb", b),
    "hopper": attended("h200-141gb", h),
    "hopper single": attended("h200-141gb", f),
    "no gradient": attended("a100-80gb", f, grad=False),
}), flush=True)
import os
os._exit(0)
"""
_EFFICIENT, _FLASH = "scaled_dot_product_efficient_attention", "scaled_dot_product_flash_attention"


@pytest.fixture(scope="module")
def choices() -> dict[str, tuple[str, list[int], list[str]]]:
    try:
        build_shim()
    except ShimUnavailable as error:
        pytest.skip(str(error))
    done = subprocess.run([sys.executable, "-c", _CHOICES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[str, list[int], list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        ("single", _EFFICIENT),
        ("half", _FLASH),
        ("wide", _FLASH),
        ("masked", _EFFICIENT),
        ("odd", "safe_softmax"),
        ("oblong causal", _EFFICIENT),
        ("old half", _EFFICIENT),
        ("old brain", "safe_softmax"),
        ("hopper", "scaled_dot_product_cudnn_attention"),
        ("hopper single", _EFFICIENT),
        ("no gradient", _EFFICIENT),
    ],
)
def test_the_kernel_is_the_one_that_torch_takes_on_the_card(
    choices: dict[str, tuple[str, list[int], list[str]]], call: str, kernel: str
) -> None:
    assert choices[call][0] == kernel


# What follows the three inputs, in order: the result, rows of sums, ..., the gradient given, ...
_WHOLE, _ROWS = 4 * 2 * 4 * 200 * 64, 4 * 2 * 4 * 200


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (
            "single",
            [_WHOLE, 4 * 8 * 224, *[_WHOLE] * 4, _WHOLE, _ROWS, _ROWS, 524_800],
        ),
        ("no gradient", [_WHOLE]),
        (
            "half",
            # the gradient and the result are copied: flash wants heads beside each other
            [_WHOLE // 2, _ROWS, 16, 8, *[_WHOLE // 2] * 6, 4 * 8 * 256, 4 * 8 * 256 * 64],
        ),
        (
            "wide",  # keys in four parts; in backward 160 is rounded up to 192
            [
                *(512_000, 6400, 4 * 6400, 4 * 4 * 1600 * 192, 16, 8),
                *(*[512_000] * 6, 4 * 8 * 256, 4 * 8 * 256 * 192),
            ],
        ),
    ],
)
def test_the_kernel_takes_what_it_was_seen_to_take(
    choices: dict[str, tuple[str, list[int], list[str]]], call: str, sizes: list[int]
) -> None:
    assert choices[call][1] == sizes


def test_only_what_cudnn_takes_is_an_estimate(
    choices: dict[str, tuple[str, list[int], list[str]]],
) -> None:
    named = {call: estimated for call, (_, _, estimated) in choices.items() if estimated}
    assert named == {"hopper": ["workspace of cuDNN's attention"]}
