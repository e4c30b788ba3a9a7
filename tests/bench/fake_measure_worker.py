"""``bench.measure_worker`` with a stand-in GPU, on which a batch of two does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cuda as cuda_module
from bench import measure as measure_module
from bench import measure_worker
from bench.build_workload import build_workload
from bench.case import Case
from bench.losses import cross_entropy_and_dice
from bench.units import GIB
from bench.workload import Mark, Workload
from tests.bench.fake_cuda import FakeCuda

__all__ = ["main"]


def main() -> None:
    """Serve cases as the real worker does."""
    gpu = FakeCuda()

    def build(case: Case, mark: Mark, device: str | torch.device) -> Workload:
        workload = build_workload(case, mark, device)

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            gpu.allocate(case.batch_size * GIB // 2)
            gpu.free(case.batch_size * GIB // 2)
            return cross_entropy_and_dice(logits, target)

        workload.loss = loss
        return workload

    with pytest.MonkeyPatch.context() as patched:
        replacement: Any = lambda: gpu  # noqa: E731 - of a class
        patched.setattr(cuda_module, "TorchCuda", replacement)
        patched.setattr(measure_module, "build_workload", build)
        measure_worker.main()


if __name__ == "__main__":
    main()
