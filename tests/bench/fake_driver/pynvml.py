"""A stand-in for the package ``pynvml`` that processes share: its GPUs are in a JSON file.

``$FAKE_NVML`` names the file. A process on a GPU is listed as long as its owner lives, as the
driver does it; ``hidden`` ones are not listed, but their memory is in use.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["NVMLError", "change", "nvmlMemory_v2"]

nvmlMemory_v2 = 2


class NVMLError(Exception):
    """What a call that NVML refuses raises."""


def _path() -> Path:
    return Path(os.environ["FAKE_NVML"])


def _state() -> dict[str, Any]:
    state: dict[str, Any] = json.loads(_path().read_text())
    return state


def change(**fields: Any) -> None:
    """Replace fields of the file; of ``uses`` (pid, bytes, owner, hidden, uuid), add one."""
    with _path().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _change(fields)


def _change(fields: dict[str, Any]) -> None:
    state = _state()
    if "use" in fields:
        state["uses"].append(fields.pop("use"))
    aside = _path().with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(state | fields))
    aside.replace(_path())


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _uses(handle: int) -> list[dict[str, Any]]:
    state = _state()
    here = [u for u in state["uses"] if u.get("uuid", state["uuids"][0]) == state["uuids"][handle]]
    return [use for use in here if _alive(use["owner"])]


def nvmlInit() -> None:
    if _state().get("lost"):
        raise NVMLError("GPU is lost")


def nvmlShutdown() -> None:
    pass


def nvmlSystemGetDriverVersion() -> str:
    return "580.65.06"


def nvmlDeviceGetCount() -> int:
    return len(_state()["uuids"])


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetUUID(handle: int) -> str:
    return str(_state()["uuids"][handle])


def nvmlDeviceGetName(_handle: int) -> str:
    return "NVIDIA Test"


def nvmlDeviceGetMemoryInfo(handle: int, version: int | None = None) -> Any:
    del version
    return SimpleNamespace(
        total=2**36, used=_state()["idle"] + sum(u["bytes"] for u in _uses(handle))
    )


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[Any]:
    if _state().get("no_processes"):
        raise NVMLError("Not Supported")
    return [
        SimpleNamespace(pid=u["pid"], usedGpuMemory=u["bytes"])
        for u in _uses(handle)
        if not u["hidden"]
    ]
