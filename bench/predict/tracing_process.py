"""What makes a process one that traces: the shim ahead of torch, then what torch is to answer.

Workers, the trial of a tracer and the tests that users' pytest hands over are each such a process.
"""

from __future__ import annotations

from typing import Any

__all__ = ["become"]


def become(tracer: str) -> None:
    """Make this process trace with ``tracer``: "cuda", "cuda-shim" or "cpu". torch is not yet here.

    Raises RuntimeError where the shim is wanted and torch is imported, ShimUnavailable where the
    shim cannot be built or loaded.
    """
    if tracer == "cuda-shim":
        from bench.predict.shim import build_shim, load_shim

        load_shim(build_shim())
    _let_modules_be_copied()
    if tracer == "cuda":
        from bench.predict.recurrent_layers import register_recurrent_layers

        register_recurrent_layers()
    if tracer == "cuda-shim":
        from bench.predict.cuda_kernels import register_cuda_kernels

        register_cuda_kernels()
        _let_amp_be_used()


def _let_modules_be_copied() -> None:
    """Let the copy of a fake tensor belong to the tensor's mode, its value be forgotten.

    torch copies all that a tensor holds, and so the mode. A copied mode gives weak references to
    storages back that it never took: the heap is broken by that, and a process dies of it later.
    The value that a fake tensor of the CPU may know is a real tensor, whose copying is refused.
    """
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def itself(mode: FakeTensorMode, _memo: dict[int, Any]) -> FakeTensorMode:
        return mode

    def without_value(tensor: Any, memo: dict[int, Any]) -> Tensor:
        if tensor.constant is not None:
            memo[id(tensor.constant)] = None
        copied: Tensor = Tensor.__deepcopy__(tensor, memo)  # type: ignore[no-untyped-call]
        return copied

    FakeTensorMode.__deepcopy__ = itself  # type: ignore[attr-defined]
    FakeTensor.__deepcopy__ = without_value  # type: ignore[method-assign]


def _let_amp_be_used() -> None:
    """Let autocast, GradScaler and a checkpoint's recomputation use CUDA, which they ask about."""
    import torch
    import torch.cuda.amp.common

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # Emulation counts as support, so torch says yes on every card that CUDA 11 and later knows.
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True  # noqa: ARG005
