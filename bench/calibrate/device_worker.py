"""The process that measures calls on a GPU: ``python -m bench.calibrate.device_worker``.

``cudnn.benchmark`` is on or off for the whole process, as ``MEMBENCH_CUDNN_BENCHMARK`` says: torch
keeps a plan once found for a call, whoever found it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bench import nvml
from bench.serve import serve

__all__ = ["BENCHMARK_VARIABLE", "handler", "main"]

BENCHMARK_VARIABLE = "MEMBENCH_CUDNN_BENCHMARK"

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def main() -> None:
    """Find the GPU, then serve requests of ``bench.calibrate.session``."""
    used_before = {d.uuid.lower(): nvml.device_used_bytes(d.uuid) for d in nvml.devices()}
    import torch

    from bench.cuda import TorchCuda

    cuda = TorchCuda()
    torch.backends.cudnn.benchmark = os.environ.get(BENCHMARK_VARIABLE) == "1"
    cudnn: Any = torch.backends.cudnn  # without types in torch 2.13
    hello = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(cudnn.version()),
        "driver": nvml.driver_version(),
        "gpu": cuda.name,
        "gpu_uuid": cuda.uuid,
        "memory_bytes": cuda.total_bytes,
        "compute_capability": cuda.compute_capability,
    }
    serve(hello, handler(cuda, used_before.get(cuda.uuid.lower())))


def handler(cuda: Any, used_before_bytes: int | None) -> Handler:
    """Return what answers requests, of one key: ``convolution``, ``operator`` or ``context``."""

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        import torch

        from bench.calibrate import device
        from bench.calibrate.context import read_context
        from bench.predict.library_calls import ConvolutionCall, OperatorCall

        if "context" in request:
            return read_context(cuda, request["context"], used_before_bytes)
        torch.cuda.empty_cache()  # cuDNN tries out what fits beside the cache; on a CPU: nothing
        if "convolution" in request:
            call = ConvolutionCall.from_dict(request["convolution"])
            return device.take_reading(
                cuda, lambda: device.convolution_operation(call, cuda.device), call.tensor_bytes
            )
        operator = OperatorCall(**request["operator"])
        return device.take_reading(
            cuda, lambda: device.operator_operation(operator, cuda.device), operator.operand_bytes
        )

    return handle


if __name__ == "__main__":
    main()
