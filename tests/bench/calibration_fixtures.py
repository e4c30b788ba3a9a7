"""A GPU for tests whose convolutions take known workspaces, and calls to ask it about."""

from __future__ import annotations

from typing import Any

from bench.child import ChildCrashError
from bench.predict.library_calls import ConvolutionCall
from bench.units import MIB

__all__ = ["HELLO", "FakeMeasurer", "FakeStart", "convolution", "first_bytes", "workspace_bytes"]

HELLO: dict[str, Any] = {
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "cudnn": "91002",
    "driver": "580.1",
    "gpu": "NVIDIA H200",
    "gpu_uuid": "GPU-1",
    "memory_bytes": 150109945856,
    "compute_capability": "9.0",
}


def convolution(side: int = 16, channels: int = 4, **changes: Any) -> ConvolutionCall:
    """A forward 3x3x3 convolution of float32, ``channels`` to ``channels``, at ``side`` cubed."""
    shape = (1, channels, side, side, side)
    values: dict[str, Any] = {
        "direction": "forward",
        "dtype": "float32",
        "channels_last": False,
        "transposed": False,
        "groups": 1,
        "input": shape,
        "weight": (channels, channels, 3, 3, 3),
        "output": shape,
        "stride": (1, 1, 1),
        "padding": (1, 1, 1),
        "dilation": (1, 1, 1),
        "output_padding": (0, 0, 0),
    }
    return ConvolutionCall(**{**values, **changes})


def workspace_bytes(call: ConvolutionCall, benchmark: bool) -> int:
    """What the fake GPU takes: a third of the operands, a half with ``cudnn.benchmark``."""
    return call.operand_bytes // (2 if benchmark else 3) + 512 * len(call.direction)


def first_bytes(call: ConvolutionCall, benchmark: bool) -> int:
    """What it takes the first time: three times as much where it tries algorithms out."""
    return workspace_bytes(call, benchmark) * (3 if benchmark else 1)


class FakeMeasurer:
    """Answers as ``bench.calibrate.device_worker`` does; ``crashes`` on calls of those channels."""

    def __init__(self, owner: FakeStart, benchmark: bool) -> None:
        self.owner, self.benchmark, self.finished = owner, benchmark, False
        self.asked: list[dict[str, Any]] = []

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        assert not self.finished
        assert limit_s > 0
        self.asked.append(request)
        self.owner.asked.append(request)
        if "context" in request:
            name = request["context"]["network"]
            return {
                "bare_bytes": 400 * MIB,
                "cudnn_bytes": 420 * MIB,
                "network_bytes": (450 + len(name)) * MIB,
                "cublas_workspace_bytes": 32 * MIB,
                "notes": ["read by NVML"],
            }
        if "operator" in request:
            taken = 1024 if request["operator"]["operator"].startswith("aten.max_pool") else 0
            return {"first_bytes": taken, "workspace_bytes": taken}
        call = ConvolutionCall.from_dict(request["convolution"])
        if call.input[1] in self.owner.crashes:
            raise ChildCrashError("process killed by SIGSEGV")
        return {
            "first_bytes": first_bytes(call, self.benchmark),
            "workspace_bytes": workspace_bytes(call, self.benchmark),
        }

    def finish(self) -> None:
        self.finished = True


class FakeStart:
    """Starts ``FakeMeasurer``s and remembers them."""

    def __init__(self, crashes: tuple[int, ...] = ()) -> None:
        self.crashes = crashes
        self.processes: list[FakeMeasurer] = []
        self.asked: list[dict[str, Any]] = []

    def __call__(self, benchmark: bool) -> FakeMeasurer:
        self.processes.append(FakeMeasurer(self, benchmark))
        return self.processes[-1]
