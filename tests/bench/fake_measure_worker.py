"""``bench.measure_worker`` with a stand-in GPU, on which a batch of two does not fit."""

from __future__ import annotations

from typing import Any

import bench.cuda
import bench.measure
from bench import measure_worker
from bench.units import GIB
from tests.bench.fake_cuda import FakeCuda

__all__ = ["main"]


def main() -> None:
    """Serve cases as the real worker does."""
    cuda = FakeCuda()
    build = bench.measure.build_workload

    def build_too_large(case: Any, mark: Any) -> Any:
        workload = build(case, mark)
        if case.batch_size > 1:
            loss = workload.loss
            workload.loss = lambda *given: (cuda.allocate(2 * GIB), loss(*given))[1]
        return workload

    bench.measure.build_workload = build_too_large
    bench.cuda.TorchCuda = lambda: cuda  # type: ignore[assignment,misc]
    measure_worker.main()


if __name__ == "__main__":
    main()
