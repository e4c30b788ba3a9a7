"""The in-place norms on the CPU, against the eager pair that each takes the place of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from memsave import InPlaceABN, InPlaceGroupNorm, InPlaceInstanceNorm
from tests.benchmarks.in_place_steps import forward_and_backward, pair
from tests.benchmarks.side_by_side import Ratio, compare, skip_if_busy

SHAPE = (1, 32, 64, 64, 64)


@dataclass(frozen=True)
class Layer:
    """A norm in place, and the plain one."""

    ours: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]


LAYERS = {
    "InPlaceABN": Layer(lambda: InPlaceABN(32), lambda: nn.BatchNorm3d(32)),
    "InPlaceInstanceNorm": Layer(
        lambda: InPlaceInstanceNorm(32, affine=True), lambda: nn.InstanceNorm3d(32, affine=True)
    ),
    "InPlaceGroupNorm": Layer(lambda: InPlaceGroupNorm(8, 32), lambda: nn.GroupNorm(8, 32)),
}


def _measure(
    benchmark: BenchmarkFixture, name: str, clock: Callable[[], float], suffix: str
) -> Ratio | None:
    torch.manual_seed(0)
    layer, x, dz = LAYERS[name], torch.randn(SHAPE), torch.randn(SHAPE)
    plain = layer.plain()
    return compare(
        benchmark,
        f"{name} {'x'.join(map(str, SHAPE))} float32, {suffix}",
        forward_and_backward(layer.ours(), x, dz),
        (f"{type(plain).__name__} + LeakyReLU", forward_and_backward(pair(plain), x, dz)),
        goal=1.0,
        clock=clock,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward_take_no_more_time_than_the_eager_pair(
    benchmark: BenchmarkFixture, name: str
) -> None:
    """Asserted with a quarter more than the goal, and only where nobody else uses the cores.

    The quarter is a guess at the noise of cores left alone, not a measurement. On cores in use
    the ratio says little of the code: at loads of 8 to 10 on two cores, in-place ABN took 1.2, and
    2.6 with parts of a quarter of the size, since all threads wait for the last one at each part.
    """
    ratio = _measure(benchmark, name, time.perf_counter, f"{torch.get_num_threads()} threads")
    if ratio is not None:
        skip_if_busy()
        assert ratio.ratio < 1.25 * ratio.goal


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward_take_no_more_processor_time_than_the_eager_pair(
    benchmark: BenchmarkFixture, name: str
) -> None:
    """One thread's own time, which neighbours hardly change.

    In runs at loads of 1 to 7: ABN 0.69 to 0.76, instance norm 0.34 to 0.40, group norm 0.67 to
    0.79.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratio = _measure(benchmark, name, time.thread_time, "processor time of 1 thread")
    finally:
        torch.set_num_threads(threads)
    if ratio is not None:
        assert ratio.ratio < ratio.goal
