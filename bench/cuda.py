"""All that a measurement asks of CUDA, behind one seam: torch's answer, or a test's stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from bench.errors import MembenchError

__all__ = ["Cuda", "TorchCuda"]


class Cuda(Protocol):
    """One GPU. ``memory_stats`` has torch's flat keys, such as ``allocated_bytes.all.peak``."""

    @property
    def device(self) -> torch.device:
        """The device on which a workload is built."""

    @property
    def uuid(self) -> str:
        """The GPU's UUID as NVML writes it, ``GPU-...``."""

    def memory_stats(self) -> dict[str, int]:
        """Return the caching allocator's counters."""

    def reset_peak_memory_stats(self) -> None:
        """Set every peak to its current value."""

    def synchronize(self) -> None:
        """Wait until the GPU has done all that was asked of it."""

    def mem_get_info(self) -> tuple[int, int]:
        """Return (free, total) bytes of the device, as cudaMemGetInfo does; makes the context."""

    def set_memory_fraction(self, fraction: float) -> None:
        """Let the caching allocator hold no more than this fraction of the total."""

    def time_s(self, run: Callable[[], None]) -> float:
        """Run something and return the seconds the GPU took, by two events around it."""


class TorchCuda:
    """The GPU that torch calls ``cuda:0``; CUDA_VISIBLE_DEVICES decides which that is.

    Errors: MembenchError where torch finds no GPU, or finds one that it cannot use: lost, in
    prohibited mode, or held by another process in exclusive mode.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise MembenchError(
                f"no CUDA GPU found: {_why_not()}; use --device predict to predict without one"
            )
        self._device = torch.device("cuda:0")
        try:
            properties = torch.cuda.get_device_properties(self._device)
            torch.cuda.synchronize(self._device)  # makes the context, which a lost GPU refuses
        except RuntimeError as error:
            raise MembenchError(
                f"the GPU cannot be used: {(str(error).strip().splitlines() or [''])[0]}; look at "
                "nvidia-smi, or use --device predict"
            ) from None
        self.name: str = properties.name
        self.total_bytes: int = properties.total_memory
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self._uuid = _with_prefix(str(properties.uuid))

    def visible(self) -> list[dict[str, Any]]:
        """Return name, UUID and memory of all GPUs that torch sees, this one first."""
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [
            {"name": p.name, "uuid": _with_prefix(str(p.uuid)), "memory_bytes": p.total_memory}
            for p in found
        ]

    @property
    def device(self) -> torch.device:
        """``cuda:0``."""
        return self._device

    @property
    def uuid(self) -> str:
        """The GPU's UUID, ``GPU-...``, or ``MIG-...`` for a slice of one."""
        return self._uuid

    def memory_stats(self) -> dict[str, int]:
        """Return the caching allocator's counters."""
        return dict(torch.cuda.memory_stats(self._device))

    def reset_peak_memory_stats(self) -> None:
        """Set every peak to its current value."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def synchronize(self) -> None:
        """Wait until the GPU has done all that was asked of it."""
        torch.cuda.synchronize(self._device)

    def mem_get_info(self) -> tuple[int, int]:
        """Return (free, total) bytes of the device; makes the context."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return free_bytes, total_bytes

    def set_memory_fraction(self, fraction: float) -> None:
        """Let the caching allocator hold no more than this fraction of the total."""
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)

    def time_s(self, run: Callable[[], None]) -> float:
        """Run something and return the seconds between two events recorded around it."""
        event: Any = torch.cuda.Event  # without types in torch 2.13
        begin, end = event(enable_timing=True), event(enable_timing=True)
        self.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000.0  # torch gives milliseconds


def _with_prefix(uuid: str) -> str:
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _why_not() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} sees no NVIDIA GPU (is the driver loaded?)"
