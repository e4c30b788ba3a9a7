"""What techniques that compute more cost in time: a block's training step with and without them.

The block is that of a 3D network, convolution, BatchNorm and ReLU twice, forward and backward. On
the CPU, in processor time of one thread: a GPU's ratios differ, since its convolutions take another
share of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import memsave
from tests.benchmarks.side_by_side import compare

SHAPE = (1, 16, 32, 32, 32)
Scope = Callable[[], AbstractContextManager[object]]


def _block(recomputed: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        norm, relu = nn.BatchNorm3d(16), nn.ReLU(inplace=not recomputed)
        layers += [nn.Conv3d(16, 16, 3, padding=1)]
        layers += [memsave.RecomputedNormAct(norm, relu)] if recomputed else [norm, relu]
    return nn.Sequential(*layers, nn.Conv3d(16, 2, 1))


def _plain() -> tuple[nn.Module, Scope]:
    return _block(False), nullcontext


def _recomputed() -> tuple[nn.Module, Scope]:
    model = _block(True)
    return model, lambda: memsave.recompute(model)


def _checkpointed() -> tuple[nn.Module, Scope]:
    model = nn.Sequential(_block(False))
    memsave.checkpoint_block(model[0])
    return model, nullcontext


def _bfloat16() -> tuple[nn.Module, Scope]:
    return _block(False), memsave.MixedPrecision("bf16", "cpu").forward


def _compressed() -> tuple[nn.Module, Scope]:
    model = _block(False)
    return model, lambda: memsave.compress_activations(model)


def _steps(made: tuple[nn.Module, Scope]) -> Callable[[], Callable[[], object]]:
    (model, scope), x = made, torch.randn(SHAPE)

    def run() -> None:
        model.zero_grad()
        with scope():
            y: Tensor = model(x).square().mean()
            torch.autograd.backward(y)

    return lambda: run


# The bound of what each computes once more: nearly a whole forward, a third of a step's work, for
# a checkpointed block; elementwise work alone where a norm is recomputed. A quarter is for noise.
# Converting costs what the processor's instructions make of it: measured, and not bounded.
BOUNDED = {"RecomputedNormAct": (_recomputed, 1.25), "checkpoint_block": (_checkpointed, 1.6)}
MEASURED = {"MixedPrecision bf16": _bfloat16, "compress_activations": _compressed}


def _ratio(
    benchmark: BenchmarkFixture, name: str, made: tuple[nn.Module, Scope], goal: float
) -> float | None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        ratio = compare(
            benchmark,
            f"{name} {'x'.join(map(str, SHAPE))}, processor time of 1 thread",
            _steps(made),
            ("the plain block's step", _steps(_plain())),
            goal=goal,
            rounds=9,
            clock=time.thread_time,
        )
    finally:
        torch.set_num_threads(threads)
    return None if ratio is None else ratio.ratio


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_computed_once_more_costs_no_more_than_that(
    benchmark: BenchmarkFixture, name: str
) -> None:
    make, goal = BOUNDED[name]
    ratio = _ratio(benchmark, name, make(), goal)
    assert ratio is None or ratio < goal


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_converted_is_measured(benchmark: BenchmarkFixture, name: str) -> None:
    ratio = _ratio(benchmark, name, MEASURED[name](), float("inf"))
    assert ratio is None or ratio > 0
