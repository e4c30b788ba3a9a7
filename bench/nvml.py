"""What the driver says of a GPU: names, memory used by a process, by the device, by others.

A thin seam over NVML (Python package ``nvidia-ml-py``, imported as ``pynvml``, on first use). A
reading that cannot be had is None, never 0, and why goes into ``notes``: pass a list, keep what it
gathers.

Devices are found by UUID: NVML counts them by PCI bus, torch by speed unless CUDA_DEVICE_ORDER says
otherwise. ``uuid`` is taken as torch writes it and as NVML does, with ``GPU-`` or ``MIG-`` in
front. A slice of a GPU (MIG) is found as a GPU is. A GPU that is lost costs itself alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Device",
    "ProcessUse",
    "bare_uuid",
    "best_process_bytes",
    "device_used_bytes",
    "devices",
    "driver_version",
    "find_device",
    "installed",
    "other_processes",
    "process_bytes",
    "processes",
    "uuids",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU. ``memory_bytes`` is NVML's total, a little more than CUDA reports."""

    index: int  # NVML's, not torch's
    name: str
    uuid: str  # as NVML writes it, "GPU-..."
    memory_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUse:
    """A process that holds memory of a device; None: NVML does not say how much."""

    pid: int  # the host's
    used_bytes: int | None


class _NotAvailable(Exception):
    """A reading that NVML does not give here; the message says why."""


def installed() -> bool:
    """Whether the Python package for NVML is installed; the driver's library is another matter."""
    return importlib.util.find_spec("pynvml") is not None


def devices(notes: list[str] | None = None) -> tuple[Device, ...]:
    """Return the GPUs that the driver lists, in NVML's order; empty when it lists none."""
    try:
        with _session() as nvml:
            return tuple(_whole_gpus(nvml, notes))
    except _NotAvailable as error:
        _note(notes, f"GPUs: {error}")
        return ()


def uuids() -> tuple[str, ...]:
    """Return the UUIDs of all that a case can run on: GPUs, and the slices (MIG) of each."""
    try:
        with _session() as nvml:
            return tuple(uuid for uuid, _ in _handles(nvml, []))
    except _NotAvailable:
        return ()


def find_device(uuid: str, notes: list[str] | None = None) -> Device | None:
    """Return the GPU of that UUID."""
    for device in devices(notes):
        if bare_uuid(device.uuid) == bare_uuid(uuid):
            return device
    return None


def driver_version(notes: list[str] | None = None) -> str | None:
    """Return the driver's version, such as ``"580.65.06"``."""
    try:
        with _session() as nvml:
            return _text(nvml.nvmlSystemGetDriverVersion())
    except _NotAvailable as error:
        _note(notes, f"driver version: {error}")
        return None


def process_bytes(uuid: str, pid: int, notes: list[str] | None = None) -> int | None:
    """Return the device memory that a process holds, its CUDA context included.

    None when NVML does not list the process: it knows the host's process ids, which a container
    hides from those inside.
    """
    try:
        uses = _process_uses(uuid)
    except _NotAvailable as error:
        _note(notes, f"process memory: {error}")
        return None
    mine = [use.used_bytes for use in uses if use.pid == pid]
    if not mine:
        _note(
            notes,
            f"process memory: NVML lists {len(uses)} processes and process {pid} is not one of "
            "them, as in a container, whose process ids are not the host's",
        )
        return None
    if mine[0] is None:
        _note(notes, f"process memory: NVML lists process {pid} without its memory")
    return mine[0]


def best_process_bytes(
    uuid: str, pid: int, *, reserved_bytes: int, used_before_bytes: int | None, notes: list[str]
) -> int | None:
    """Return what process ``pid`` holds of the device, by the best reading that there is.

    Its own figure, or else what the whole device has in use less ``used_before_bytes``, what was
    in use before the process came; a note says when it is the latter. None when neither is known.
    An own figure below ``reserved_bytes``, what the caching allocator holds by its own count, is
    of another process under our number, outside of this container.
    """
    missing: list[str] = []
    own_bytes = process_bytes(uuid, pid, missing)
    if own_bytes is not None and own_bytes >= reserved_bytes:
        return own_bytes
    notes += missing
    used_bytes = device_used_bytes(uuid, notes)
    if used_bytes is None or used_before_bytes is None:
        return None
    notes.append(
        "process_bytes: the device's memory in use less what was in use before this process"
    )
    return used_bytes - used_before_bytes


def processes(uuid: str, notes: list[str] | None = None) -> tuple[ProcessUse, ...] | None:
    """Return all processes on the device that NVML lists; None when it lists none at all."""
    try:
        return _process_uses(uuid)
    except _NotAvailable as error:
        _note(notes, f"processes: {error}")
        return None


def other_processes(
    uuid: str, pid: int, notes: list[str] | None = None
) -> tuple[ProcessUse, ...] | None:
    """Return the processes on the device besides ``pid``; None when NVML lists none at all.

    In a container the caller's own process may stand among them, under the host's number.
    """
    try:
        return tuple(use for use in _process_uses(uuid) if use.pid != pid)
    except _NotAvailable as error:
        _note(notes, f"other processes: {error}")
        return None


def device_used_bytes(uuid: str, notes: list[str] | None = None) -> int | None:
    """Return the memory in use on the whole device, by whomever, less the driver's reserve.

    A driver too old to tell the two apart gives both together, and a note says so.
    """
    try:
        with _session() as nvml:
            handle = _handle(nvml, uuid)
            try:
                memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
            except (nvml.NVMLError, AttributeError, TypeError):
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                _note(notes, "device memory: used includes the driver's reserve (old driver)")
            return int(memory.used)
    except _NotAvailable as error:
        _note(notes, f"device memory: {error}")
        return None


def _process_uses(uuid: str) -> tuple[ProcessUse, ...]:
    with _session() as nvml:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(_handle(nvml, uuid))
    return tuple(ProcessUse(pid=p.pid, used_bytes=p.usedGpuMemory) for p in processes)


@contextmanager
def _session() -> Iterator[Any]:
    """Give the module ``pynvml``, initialised; whatever NVML refuses becomes _NotAvailable."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise _NotAvailable("the Python package nvidia-ml-py is not installed") from None
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise _NotAvailable(f"NVML says: {error}") from None


def _handle(nvml: Any, uuid: str) -> Any:
    lost: list[str] = []
    for found, handle in _handles(nvml, lost):
        if bare_uuid(found) == bare_uuid(uuid):
            return handle
    raise _NotAvailable("; ".join([f"NVML lists no GPU {uuid}", *lost]))


def _handles(nvml: Any, lost: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (UUID, handle) of every GPU and every slice; why one cannot be had goes to ``lost``."""
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpu = nvml.nvmlDeviceGetHandleByIndex(index)
            found = [(_text(nvml.nvmlDeviceGetUUID(gpu)), gpu)]
        except nvml.NVMLError as error:
            lost.append(f"GPU {index}: {error}")
            continue
        yield from (*found, *_slices(nvml, gpu))


def _slices(nvml: Any, gpu: Any) -> Iterator[tuple[str, Any]]:
    try:
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except (nvml.NVMLError, AttributeError):  # no MIG on this GPU, or before its time
        return
    for index in range(count):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
            found = (_text(nvml.nvmlDeviceGetUUID(handle)), handle)
        except nvml.NVMLError:  # a place where no slice is
            continue
        yield found


def _whole_gpus(nvml: Any, notes: list[str] | None) -> Iterator[Device]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            device = _device(nvml, index)
        except nvml.NVMLError as error:
            _note(notes, f"GPUs: GPU {index}: NVML says: {error}")
            continue
        yield device


def _device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:  # unified memory (GB10, Jetson): no memory of the GPU's own to report
        memory_bytes = None
    return Device(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        memory_bytes=memory_bytes,
    )


def bare_uuid(uuid: str) -> str:
    """Return a UUID in the one form that torch's and NVML's can be compared in."""
    return uuid.lower().removeprefix("gpu-").removeprefix("mig-")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes before nvidia-ml-py 12


def _note(notes: list[str] | None, note: str) -> None:
    if notes is not None:
        notes.append(note)
