"""A measuring child on a GPU that is only NVML's stand-in: the case's variant says what happens.

Without torch, so that a fresh process a case costs little. ``$FAKE_CONTAINER``: NVML lists this
process under another number (``renumbered``), or not at all (``hidden``).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import time
from typing import Any

from bench.neighbours import look
from bench.serve import serve

GIB = 2**30
UUID = "GPU-aaaa-1"
READINGS = {"status": "ok", "reason": "", "process_bytes": 3 * GIB, "peak_reserved_bytes": 2 * GIB}
HOST_NUMBERS = 5_000_000  # above every number of ours
_poisoned = False


def change(**fields: Any) -> None:
    """Change what the stand-in driver says; found where the test puts it, in ``PYTHONPATH``."""
    importlib.import_module("pynvml").change(**fields)


def come(size: int, owner: int, number: int, hidden: bool = False) -> None:
    """Put a process on the GPU."""
    here = {"uuid": os.environ.get("CUDA_VISIBLE_DEVICES") or UUID}
    change(use={"pid": number, "bytes": size, "owner": owner, "hidden": hidden} | here)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    global _poisoned
    behaviour = request["case"]["variant"]
    if _poisoned or behaviour == "poison":
        _poisoned = True  # as a CUDA context after an illegal memory access: nothing works again
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if behaviour == "passer-by":
        other = subprocess.Popen(["sleep", "1.2"])
        come(7 * GIB, other.pid, 4242)
        time.sleep(2.0)
    elif behaviour.startswith("intruder"):
        come(7 * GIB, os.getppid(), 4242, hidden=behaviour.endswith("hidden"))
        time.sleep(0.2)
    elif behaviour.startswith("sleep"):
        time.sleep(float(behaviour.removeprefix("sleep")))
    elif behaviour == "lost":
        change(lost=True)
        raise RuntimeError("CUDA error: the GPU is lost")
    elif behaviour.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, behaviour))
    phases = {"forward": {"peak_allocated_bytes": GIB}}
    return {**READINGS, "phases": phases, "notes": [f"pid {os.getpid()}"]}


def main() -> None:
    """Come onto the GPU as CUDA's context does, and serve."""
    container = os.environ.get("FAKE_CONTAINER", "")
    uuid = os.environ.get("CUDA_VISIBLE_DEVICES") or UUID
    before = look(uuid)
    if before.known:
        number = os.getpid() + (HOST_NUMBERS if container == "renumbered" else 0)
        come(GIB, os.getpid(), number, hidden=container == "hidden")
    hello = {"torch": "9.9.9", "gpu": "NVIDIA Test", "gpu_uuid": uuid, "memory_bytes": 2**36}
    gpus = json.loads(os.environ.get("FAKE_GPUS", "[]"))
    serve({**hello, "occupants": before.to_dict(), "gpus": gpus}, answer)


if __name__ == "__main__":
    main()
