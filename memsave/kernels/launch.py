"""Launch a kernel again and again, at little cost to the host.

Triton looks at every argument of every launch, to find what it compiled for such ones. A norm's
kernels take the same sizes step after step, so what was compiled is found here by those sizes and
the tensors' types, and launched through Triton's own launcher, past that search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from memsave.kernels.pieces import jit

__all__ = ["Kernel"]

# Networks whose shapes change forever must not fill the host's memory.
_MOST_REMEMBERED = 4096
# Triton compiles apart for addresses divisible by 16, as PyTorch's allocator gives them. Others,
# those of slices, are left to its own search.
_ALIGNMENT = 16
# What their CompiledKernel.__getitem__ does but for hooks; of other versions that itself is called.
_KNOWS_LAUNCHER = triton.__version__.startswith(("3.6.", "3.7."))


class Kernel:
    """A function of tensors, then numbers that may change, then sizes, then what is compiled in.

    Sizes are integers, which Triton specialises on: 1, divisible by 16, of 64 bits. Floating-point
    numbers it does not, so they are no part of what is remembered: momentum may change each step.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.compiled = jit(function)
        self._ready: dict[tuple[object, ...], CompiledKernel] = {}

    def launch(
        self,
        programs: int,
        warps: int,
        tensors: tuple[Tensor, *tuple[Tensor | None, ...]],
        numbers: tuple[float, ...],
        sizes: tuple[int | str | bool, ...],
        registers: int | None = None,
    ) -> None:
        """Run ``programs`` of ``warps`` each on the current device, where all tensors are.

        ``sizes``: the integers, then the values of ``tl.constexpr`` parameters. ``registers``: as
        many a thread at most, on GPUs of compute capability 10.x.
        """
        numbers = tuple([float(n) for n in numbers])  # an integer would be specialised on
        device, bits = tensors[0].get_device(), 0
        key: list[object] = [programs, warps, sizes]
        addresses: list[int | None] = []
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            addresses.append(address)
            # Where it is: an address of the processor's memory is for Triton's search to refuse.
            key.append(None if tensor is None else (tensor.dtype, tensor.get_device()))
            bits |= address or 0
        found = tuple(key)
        ready = None if bits % _ALIGNMENT else self._ready.get(found)
        if ready is not None:
            _launch(ready, programs, device, (*addresses, *numbers, *sizes))
            return
        options = {"num_warps": warps}
        if registers is not None and self._on_data_centre_blackwell():
            options["maxnreg"] = registers
        made = self.compiled[(programs,)](*tensors, *numbers, *sizes, **options)
        # An interpreted kernel leaves nothing behind.
        if isinstance(made, CompiledKernel) and not bits % _ALIGNMENT:
            if len(self._ready) >= _MOST_REMEMBERED:
                self._ready.clear()
            self._ready[found] = made

    def _on_data_centre_blackwell(self) -> bool:
        if not isinstance(self.compiled, JITFunction):
            return False
        target = driver.active.get_current_target()
        return bool(target.backend == "cuda" and target.arch // 10 == 10)


def _launch(made: Any, programs: int, device: int, arguments: tuple[object, ...]) -> None:
    """Launch what Triton made on the current stream, with arguments as it was made for."""
    stream = torch._C._cuda_getCurrentRawStream(device)
    if _KNOWS_LAUNCHER and not _hooked():
        nobody = (None, None, None)  # is told of the launch
        launcher, kernel = made.run, made.function
        launcher(programs, 1, 1, stream, kernel, made.packed_metadata, *nobody, *arguments)
    else:
        made[(programs, 1, 1)](*arguments, stream=stream)


def _hooked() -> bool:
    """Whether somebody, such as Triton's profiler, asked to be told of launches."""
    runtime = knobs.runtime
    return any(
        getattr(hook, "calls", hook)  # a chain of hooks has a list of them
        for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook)
    )
