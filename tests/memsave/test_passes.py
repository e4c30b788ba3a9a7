"""The README's table of passes over an activation is what the code does, counted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import InPlaceABN, InPlaceGroupNorm, InPlaceInstanceNorm
from memsave.kernels.tiles import kernels_serve
from tests.benchmarks.in_place_steps import pair
from tests.benchmarks.test_in_place_speed_on_card import PASSES
from tests.memsave.passes import counted, passes_of_operators

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "InPlaceABN": lambda: InPlaceABN(6),
    "InPlaceGroupNorm": lambda: InPlaceGroupNorm(2, 6),
    "InPlaceInstanceNorm": lambda: InPlaceInstanceNorm(6, affine=True),
}


def _count(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format
) -> tuple[float, float]:
    """Return the passes of forward and backward; of odd sizes, whose tiles are cut short."""
    if not INTERPRETED:
        pytest.skip("loads and stores are seen under TRITON_INTERPRET=1 alone")
    monkeypatch.setattr("memsave.in_place_norm_ops._for_kernels", kernels_serve)
    x = torch.randn(2, 6, 9, 11, 13).contiguous(memory_format=layout)
    dz, leaf = torch.randn_like(x), x.requires_grad_()
    y = leaf * 1
    with counted(y) as forward:
        z = layer(y)
    with counted(z, dz) as backward:
        torch.autograd.backward(z, dz)
    assert forward.elsewhere > 0  # statistics
    assert backward.elsewhere > 0
    return forward.total, backward.total


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "last"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_our_kernels_read_twice_and_write_once_forward_and_read_both_twice_backward(
    name: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No element more or less: tiles that reach over an edge touch nothing there."""
    assert _count(LAYERS[name](), monkeypatch, layout) == (3, 5)


def test_with_given_statistics_nothing_is_read_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward saves a pass; the weight's gradient still needs its own."""
    counts = _count(InPlaceABN(6).eval(), monkeypatch, torch.contiguous_format)
    assert counts == (2, 5)


def test_the_eager_pair_takes_13_passes() -> None:
    """On a CPU the same four operators run as on a GPU, by names that CUDA's may differ from."""
    x, dz = torch.randn(2, 6, 9, 11, 13), torch.randn(2, 6, 9, 11, 13)
    names, passes = passes_of_operators(pair(nn.BatchNorm3d(6)), x, dz)
    assert names == [
        "native_batch_norm", "leaky_relu_", "leaky_relu_backward", "native_batch_norm_backward",
    ]  # fmt: skip
    assert passes == 13


def _rows() -> dict[str, list[str]]:
    """Cells of the README's table, by its first column."""
    text = (Path(memsave.__file__).parent / "README.md").read_text()
    (table,) = re.findall(r"\| forward and backward, counted.*?\n\n", text, re.DOTALL)
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in table.split("\n")[2:-2]]
    return {row[0]: row[1:] for row in rows}


def test_the_readme_tells_the_passes_that_were_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the bound of the ratio of times that follows from them at equal bandwidth."""
    x: Tensor = torch.randn(2, 6, 9, 11, 13)
    _, eager = passes_of_operators(pair(nn.BatchNorm3d(6)), x, torch.randn_like(x))
    forward, backward = _count(InPlaceABN(6), monkeypatch, torch.contiguous_format)
    ours = forward + backward
    fused = (2 + 1) + (4 + 1)  # a norm's passes alone: the activation rides on them
    assert ours == PASSES
    assert _rows() == {
        "in-place norms": [f"{ours:g}", "1"],
        "eager norm + leaky ReLU": [f"{eager}", f"{ours / eager:.2f}"],
        "the pair under `torch.compile`": [f"{fused}", f"{ours / fused:.2f}"],
    }
