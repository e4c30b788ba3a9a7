"""What shaped a record besides its case: versions, driver, settings, the state of the source.

Nothing here imports torch or asks the GPU through it: a prediction must load its own library
before torch, and the process that starts the cases needs none of it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench import __version__
from bench.record import Environment

__all__ = ["allocator_settings", "read_environment"]

_SOURCE_TREE = Path(__file__).resolve().parents[1]


def read_environment(
    suite: str | None = None,
    suite_hash: str | None = None,
    seed: int | None = None,
    cudnn_benchmark: bool | None = None,
    gpu: str | None = None,
    gpu_uuid: str | None = None,
    notes: tuple[str, ...] = (),
) -> Environment:
    """Return the environment of a run that starts now; what cannot be known is None.

    ``gpu`` and ``gpu_uuid``: the one that is measured; without them, the first that NVML lists.
    """
    from bench import nvml
    from bench.predict.shim import torch_build

    torch = torch_build()
    driver = nvml.driver_version()
    if gpu is None and driver is not None:
        first = next(iter(nvml.devices()), None)
        gpu, gpu_uuid = (first.name, first.uuid) if first else (None, None)
    commit, dirty = _source_state()
    return Environment(
        membench=__version__,
        torch=torch.version if torch else None,
        cuda=torch.cuda if torch else None,
        cudnn=_cudnn_version(),
        triton=_package_version("triton"),
        driver=driver,
        gpu=gpu,
        gpu_uuid=gpu_uuid,
        python=platform.python_version(),
        platform=platform.platform(),
        allocator_settings=allocator_settings(),
        cudnn_benchmark=cudnn_benchmark,
        suite=suite,
        suite_hash=suite_hash,
        commit=commit,
        dirty=dirty,
        seed=seed,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=notes,
    )


def allocator_settings() -> str:
    """Return what torch's caching allocator is told, "" when it is told nothing.

    The older name ``PYTORCH_CUDA_ALLOC_CONF`` goes before ``PYTORCH_ALLOC_CONF``, even where it is
    empty: so torch 2.11 and 2.13 read them.
    """
    older = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return os.environ.get("PYTORCH_ALLOC_CONF", "") if older is None else older


def _cudnn_version() -> str | None:
    """Return cuDNN's version: what the loaded torch says, else that of the wheel torch loads."""
    torch = sys.modules.get("torch")
    backend = getattr(getattr(torch, "backends", None), "cudnn", None)
    # Not under the shim, which stands in for a cuDNN that is not there.
    if backend is not None and torch is not None and torch.version.cuda is not None:
        number = backend.version()
        if number is not None:
            return str(number)
    for cuda in (13, 12):
        version = _package_version(f"nvidia-cudnn-cu{cuda}")
        if version is not None:
            return version
    return None


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_state() -> tuple[str | None, bool | None]:
    """Return (commit, whether files differ from it) of the tree that membench runs from.

    ``$MEMBENCH_COMMIT`` names the commit of a tree without git. An installed membench has neither:
    a repository further up (of whoever installed it) is not membench's.
    """
    named = os.environ.get("MEMBENCH_COMMIT")
    if named:
        return named, None
    if not (_SOURCE_TREE / ".git").exists():
        return None, None
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_SOURCE_TREE), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
