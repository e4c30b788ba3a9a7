"""Tiled levels on the CPU, against the network that they are held to: CCBlock with in-place ABN.

This is a CPU's time, in float32: no figure of a GPU's. Convolutions take most of it on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.losses import LOSSES
from memsave import FCN, TiledLevelsOptions, tile_levels
from tests.benchmarks.side_by_side import Prepare, compare

SHAPE = (64, 64, 48)
LOSS = "cross_entropy+dice"
GOAL = 1.5


def _steps(slabs: int) -> tuple[Prepare, Prepare]:
    """Return a step of the tiled network, and one of the network it is held to."""
    torch.manual_seed(0)
    options = TiledLevelsOptions(slabs=slabs, levels=3)
    tiled = tile_levels(FCN(block="ccblock", norm="batch_norm_leaky_relu"), options)
    plain = FCN(block="ccblock", norm="inplace_abn")
    images, target = torch.randn(1, 1, *SHAPE), torch.randint(3, (1, *SHAPE))

    def tiled_step() -> None:
        tiled.zero_grad()
        torch.autograd.backward(tiled.training_loss(images, target, LOSS))

    def plain_step() -> None:
        plain.zero_grad()
        torch.autograd.backward(LOSSES[LOSS](plain(images), target))

    return (lambda: tiled_step), (lambda: plain_step)


@pytest.mark.slow
@pytest.mark.parametrize("slices", [4, 8])
def test_a_tiled_step_is_timed_beside_one_of_in_place_norms(
    benchmark: BenchmarkFixture, slices: int
) -> None:
    """Slabs of as many slices as the floor's 256x256x152 in 38 slabs, and of twice as many.

    Processor time of one thread, so that neighbours on the cores hardly count. Held to twice the
    goal: the goal itself is a GPU's, where halos and launches weigh otherwise.
    """
    ours, theirs = _steps(SHAPE[-1] // slices)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        what = f"tiled step, slabs of {slices} slices, {'x'.join(map(str, SHAPE))} float32, CPU"
        clock: Callable[[], float] = time.process_time
        against = ("CCBlock + in-place ABN", theirs)
        ratio = compare(benchmark, what, ours, against, goal=GOAL, rounds=3, clock=clock)
    finally:
        torch.set_num_threads(threads)
    if ratio is not None:
        assert ratio.ratio < 2 * GOAL
