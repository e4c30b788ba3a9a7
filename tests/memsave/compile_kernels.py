"""Compile the Triton kernels for a compute capability, without a GPU, as their launchers ask for.

``python -m tests.memsave.compile_kernels 80`` runs the launchers on tensors without memory (meta)
while Triton believes that a GPU of that capability is there, and stops each launch once its cubin
is made: types, sizes that are 1, sizes and addresses divisible by 16, and 64-bit numbers are
specialised as on a GPU. It prints one JSON object: "skipped", a reason, or "compiled", a list.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, float16, float32

__all__ = ["CASES", "Case", "compile_for"]

_LARGEST_GRID = 2**31 - 1  # along x; the kernels use no other axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A launch of all kernels that an in-place norm of this input needs."""

    shape: tuple[int, ...]
    dtype: torch.dtype = float32
    dz_dtype: torch.dtype | None = None
    groups: int | None = None
    channels_last: bool = False
    aligned: bool = True  # addresses divisible by 16
    affine: bool = True
    parameters: torch.dtype = float32
    running: torch.dtype | None = None
    use_running: bool = False
    activation: str = "leaky_relu"
    synchronised: bool = False


CASES = {
    "float32 with odd sizes and addresses": Case(
        shape=(2, 5, 3, 7, 11), running=float32, aligned=False
    ),
    "float32 with round sizes": Case(shape=(2, 32, 16, 64, 64), groups=8, activation="elu"),
    "float32 with long rows": Case(shape=(1, 64, 96, 96, 96), running=float32),
    "float32 with long rows, ELU": Case(shape=(1, 64, 96, 96, 96), activation="elu"),
    "float32 channels last": Case(shape=(2, 66, 3, 7, 11), channels_last=True, aligned=False),
    "float32 through 64-bit strides": Case(shape=(3, 32, 1024, 1024, 65), groups=4),
    "float32 through 64-bit sizes": Case(shape=(5, 1, 1024, 1024, 1023), running=float32),
    "float32 of a single value": Case(shape=(1, 1, 1), running=float32, activation="elu"),
    "float32 of a single value of a group": Case(shape=(1, 1, 1), groups=1, affine=False),
    "float16 of float32 parameters": Case(
        shape=(2, 32, 16, 64, 64), dtype=float16, running=float32
    ),
    "float16 all of it, channels last": Case(
        shape=(2, 32, 16, 64, 64), dtype=float16, parameters=float16, running=float16,
        channels_last=True, activation="elu",
    ),
    "float16 instances without parameters, float32 dz": Case(
        shape=(2, 6, 5, 7), dtype=float16, dz_dtype=float32, groups=6, affine=False,
        activation="identity",
    ),
    "float16 in evaluation": Case(
        shape=(2, 6, 5, 7), dtype=float16, running=float32, use_running=True
    ),
    "float16 synchronised": Case(shape=(2, 6, 5, 7), dtype=float16, synchronised=True),
    "bfloat16 of float32 parameters": Case(
        shape=(2, 32, 16, 64, 64), dtype=torch.bfloat16, running=float32
    ),
    "bfloat16 all of it, channels last": Case(
        shape=(2, 66, 3, 7, 11), dtype=torch.bfloat16, parameters=torch.bfloat16,
        running=torch.bfloat16, channels_last=True, activation="elu",
    ),
}  # fmt: skip


@dataclass(slots=True)
class _PretendedGpu:
    """What Triton asks a driver for before it launches."""

    target: Any
    compiled: list[dict[str, Any]] = field(default_factory=list)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> Any:
        return self.target

    def instead_of_launching(self, kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what stands for ``kernel[grid]``: compiles, and launches nothing."""

        def compile_it(*args: Any, **options: Any) -> None:
            assert len(grid) == 1, f"{kernel.__name__} is launched on a grid {grid}"
            assert 1 <= grid[0] <= _LARGEST_GRID, f"{kernel.__name__} is launched on a grid {grid}"
            made = kernel.run(*args, grid=grid, warmup=True, **options)
            cubin = made.asm["cubin"]
            self.compiled.append(
                {
                    "kernel": kernel.__name__,
                    "capability": made.metadata.target.arch,
                    "is_elf": cubin[:4] == b"\x7fELF",
                    "shared_bytes": made.metadata.shared,
                    "signature": made.src.signature,
                    "wide_loads": len(re.findall(r"\bld\.global\S*\.v4\.b32\b", made.asm["ptx"])),
                    "wide_stores": len(re.findall(r"\bst\.global\S*\.v4\.b32\b", made.asm["ptx"])),
                    "spilled_bytes": _spilled_bytes(made.asm["ptx"], made.metadata.target.arch),
                }
            )

        return compile_it


def _spilled_bytes(ptx: str, capability: int) -> int:
    """Return what a thread keeps in local memory for want of registers, as ptxas tells it."""
    from triton import knobs

    suffix = "a" if capability >= 90 else ""  # as Triton compiles it, and with the same ptxas
    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        told = subprocess.run(
            [tool.path, "-v", f"--gpu-name=sm_{capability}{suffix}", source, "-o",
             f"{folder}/kernel.cubin"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    (spilled,) = re.findall(r"(\d+) bytes spill stores", told)
    return int(spilled)


def compile_for(capability: int) -> list[dict[str, Any]]:
    """Return what was compiled for ``capability`` (80 is 8.0), case after case."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from memsave.kernels.tiles import kernels_serve

    gpu = _PretendedGpu(GPUTarget("cuda", capability, 32))
    driver.set_active(gpu)
    with (
        mock.patch.object(
            JITFunction, "__getitem__", lambda kernel, grid: gpu.instead_of_launching(kernel, grid)
        ),
        mock.patch("memsave.in_place_norm_ops._for_kernels", kernels_serve),
        mock.patch("memsave.in_place_sync_maths.kernels_run", kernels_serve),
    ):
        for name, case in CASES.items():
            if case.dtype == torch.bfloat16 and capability < 80:
                continue
            before = len(gpu.compiled)
            (_launch_synchronised if case.synchronised else _launch)(case)
            for made in gpu.compiled[before:]:
                made["case"] = name
    return gpu.compiled


def _empty(case: Case, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the case's shape and layout, at no address."""
    n, c, *places = case.shape
    shape = (n, *places, c) if case.channels_last else case.shape
    flat = torch.empty(torch.Size(shape).numel() + 1, dtype=dtype, device="meta")
    x = flat[0 if case.aligned else 1 :][: torch.Size(shape).numel()].view(shape)
    return x.movedim(-1, 1) if case.channels_last else x


def _per_channel(case: Case, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else torch.empty(case.shape[1], dtype=dtype, device="meta")


def _launch(case: Case) -> None:
    """Launch the kernels of a norm, forward and backward."""
    from memsave import in_place_norm_ops as ops

    x, dz = _empty(case, case.dtype), _empty(case, case.dz_dtype or case.dtype)
    parameters = case.parameters if case.affine else None
    weight, bias = _per_channel(case, parameters), _per_channel(case, parameters)
    running = _per_channel(case, case.running), _per_channel(case, case.running)
    layout, both = ops._layout(case.groups, x), ops._layout(case.groups, x, dz)
    assert layout is not None
    assert both is not None
    rstd, buffer = ops._forward_results(x, case.groups, case.use_running, layout)
    ops._run_forward_kernels(
        layout, x, weight, bias, *running, case.use_running, 0.1, 1e-5, case.activation, 0.01,
        rstd, buffer,
    )  # fmt: skip
    results = ops._backward_results(x, both)
    ops._run_backward_kernels(
        both, x, dz, weight, bias, rstd, case.use_running, 1e-5, case.activation, 0.01, *results
    )


def _launch_synchronised(case: Case) -> None:
    """Launch the kernels of a norm over processes; its forward pass is that of evaluation."""
    from memsave.in_place_sync_maths import gradient_, local_means, local_statistics

    x, dz = _empty(case, case.dtype), _empty(case, case.dz_dtype or case.dtype)
    weight, bias = _per_channel(case, case.parameters), _per_channel(case, case.parameters)
    settings = (1e-5, case.activation, 0.01)
    mean, _ = local_statistics(x)
    _, _, means = local_means(x, dz, weight, bias, settings)
    gradient_(x, dz, mean, means, weight, bias, settings)


def _missing() -> str | None:
    """Return what is not there to compile with, or None."""
    try:
        from triton import knobs
    except ImportError:
        return "Triton, with its knobs, is not installed"
    try:
        knobs.nvidia.ptxas  # noqa: B018  # looked for when asked for
    except RuntimeError as error:
        return f"Triton has no ptxas: {error}"
    return None


def _main(capability: int) -> None:
    reason = _missing()
    if reason is not None:
        print(json.dumps({"skipped": reason}))
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing compiled earlier stands for this
        print(json.dumps({"compiled": compile_for(capability)}))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
