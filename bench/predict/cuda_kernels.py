"""Operators that CUDA runs as one kernel each, said to be so where torch was built without CUDA.

For these torch has both a kernel and a formula of other operators. Autograd takes the formula where
the device has no kernel; so a build without CUDA would trace a fake GPU's SiLU backward as the
formula's five operators, with four tensors too many alive. Found by asking a CUDA build's
dispatcher (2.11 and 2.13) for operators that have both.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.predict.recurrent_layers import register_recurrent_layers
from bench.predict.traced_card import trace_for

__all__ = ["ONE_KERNEL", "register_cuda_kernels"]

ONE_KERNEL = ("silu_backward", "mish_backward", "_fused_rms_norm")

_kept: list[torch.library.Library] = []  # a library's kernels go when it does


def register_cuda_kernels() -> None:
    """Register the kernels, for the rest of the process; nothing is done a second time.

    They are there to be seen by the dispatcher and never run: fake tensors compute nothing. With
    them come the recurrent layers, see ``bench.predict.recurrent_layers``.
    """
    if _kept:
        return
    library = torch.library.Library("aten", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
    for name in ONE_KERNEL:
        known = hasattr(torch.ops.aten, name)
        if known and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            library.impl(name, _never_run)  # type: ignore[no-untyped-call]
    _kept.append(library)
    register_recurrent_layers()
    trace_for()


def _never_run(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this operator has no kernel here: it is for fake tensors")
