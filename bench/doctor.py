"""What this machine offers membench: found, missing or broken, and what to do about it.

The tracer is not believed but tried, in a child process. torch is not imported in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from bench import nvml
from bench.errors import MembenchError
from bench.predict.cards import all_cards, card_files, card_name_for_gpu, user_cards_folder
from bench.predict.shim import (
    ShimUnavailable,
    cache_folder,
    choose_tracer,
    find_compiler,
    gpu_visible,
    torch_build,
    wanted_cache_folder,
)
from bench.units import format_bytes

__all__ = ["Check", "Diagnosis", "diagnose"]

State = Literal["ok", "missing", "problem"]

_OLDEST_TORCH = (2, 11)
_TRIAL_LIMIT_S = 300.0  # torch's import from a cold network disk
_SOURCE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at; ``advice`` is empty when there is nothing to do."""

    name: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All checks, and what they come to: whether cases can be predicted, and measured, here."""

    can_predict: bool
    can_measure: bool
    checks: tuple[Check, ...]


def diagnose() -> Diagnosis:
    """Look at everything that a run needs or can use."""
    torch = _torch()
    usable = torch.state == "ok"
    tracing = _tracing(usable)
    visible, _ = gpu_visible()
    checks = (
        *(torch, _cuda(), *_gpus(), _nvml(), _compiler()),
        *(*tracing, _triton(), _cache(), _cards()),
    )
    return Diagnosis(
        can_predict=usable and tracing[-1].state == "ok",
        can_measure=usable and visible,
        checks=checks,
    )


def _torch() -> Check:
    torch = torch_build()
    oldest = ".".join(map(str, _OLDEST_TORCH))
    advice = f'nothing runs without it: pip install "torch>={oldest}"'
    if torch is None:
        return Check(name="torch", state="missing", found="not installed", advice=advice)
    if torch.release is None or torch.release < _OLDEST_TORCH:
        found = f"{torch.version} is older than {oldest}"
        return Check(name="torch", state="problem", found=found, advice=advice)
    return Check(name="torch", state="ok", found=f"{torch.version} in {torch.folder}")


def _cuda() -> Check:
    torch = torch_build()
    if torch is not None and torch.cuda is not None:
        return Check(name="CUDA", state="ok", found=f"torch is built for CUDA {torch.cuda}")
    return Check(
        name="CUDA",
        state="missing",
        found="torch is built without CUDA" if torch else "torch is not installed",
        advice="predictions need none; to measure, install a CUDA build of torch",
    )


def _gpus() -> tuple[Check, ...]:
    visible, why = gpu_visible()
    devices = nvml.devices()
    if not visible and devices:
        found = f"{why}; the driver lists {', '.join(map(_describe, devices))}"
        advice = "predictions need none; to measure, let torch use it"
        return (Check(name="GPU", state="problem", found=found, advice=advice),)
    if not visible:
        advice = "predictions need none; to measure, run on a machine with an NVIDIA GPU"
        return (Check(name="GPU", state="missing", found=why, advice=advice),)
    if not devices:
        return (Check(name="GPU", state="ok", found=why),)
    return tuple(Check(name="GPU", state="ok", found=_describe(device)) for device in devices)


def _describe(device: nvml.Device) -> str:
    if device.memory_bytes is None:
        return f"{device.name}, {device.uuid}"
    try:
        card = f", card {card_name_for_gpu(device.name, device.memory_bytes)}"
    except MembenchError:
        card = ""  # a card file that cannot be read is a check of its own
    return f"{device.name}, {format_bytes(device.memory_bytes)}, {device.uuid}{card}"


def _nvml() -> Check:
    notes: list[str] = []
    version = nvml.driver_version(notes)
    if version is not None:
        return Check(name="NVML", state="ok", found=f"driver {version}")
    advice = "predictions need none; without it, a measurement lacks what nvidia-smi shows"
    if not nvml.installed():
        advice = "pip install nvidia-ml-py"
    why = notes[0].removeprefix("driver version: ")
    return Check(name="NVML", state="missing", found=why, advice=advice)


def _compiler() -> Check:
    try:
        found = " ".join(find_compiler())
    except ShimUnavailable as error:
        advice = "needed to trace as on CUDA where there is no GPU: install g++"
        return Check(name="compiler", state="missing", found=str(error), advice=advice)
    return Check(name="compiler", state="ok", found=found)


def _tracing(usable: bool) -> tuple[Check, ...]:
    """The tracer that predictions will use, and whether it works."""
    if not usable:
        advice = "put torch right first"
        return (Check(name="tracer", state="missing", found="no usable torch", advice=advice),)
    try:
        tracer, why = choose_tracer()
    except MembenchError as error:
        advice = "predictions end with this error"
        return (Check(name="tracer", state="problem", found=str(error), advice=advice),)
    found = f"{tracer}: {why}"
    if tracer == "cpu":
        advice = "predictions show the CPU's operators, too much memory in mixed precision"
        return (Check(name="tracer", state="problem", found=found, advice=advice), _trial(tracer))
    return (Check(name="tracer", state="ok", found=found), _trial(tracer))


def _trial(tracer: str) -> Check:
    path = os.pathsep.join(p for p in (str(_SOURCE_ROOT), os.environ.get("PYTHONPATH")) if p)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.predict.trial", tracer],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRIAL_LIMIT_S,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        found, returncode = f"no answer in {_TRIAL_LIMIT_S:.0f} s", -1
    else:
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        found = lines[-1] if lines else f"exit status {done.returncode} without a word"
        returncode = done.returncode
    if returncode == 0:
        return Check(name="trial", state="ok", found=found)
    advice = "predictions will fail; MEMBENCH_TRACER=cpu traces on the CPU instead"
    return Check(name="trial", state="problem", found=found, advice=advice)


def _triton() -> Check:
    try:
        return Check(name="Triton", state="ok", found=metadata.version("triton"))
    except metadata.PackageNotFoundError:
        advice = "plain PyTorch operations take the place of its kernels: pip install triton"
        return Check(name="Triton", state="missing", found="not installed", advice=advice)


def _cache() -> Check:
    wanted, used = wanted_cache_folder(), cache_folder()
    if wanted == used:
        return Check(name="cache folder", state="ok", found=str(used))
    return Check(
        name="cache folder",
        state="problem",
        found=f"{wanted} cannot be written; {used} is used",
        advice="set MEMBENCH_CACHE to a folder that can be written and stays",
    )


def _cards() -> Check:
    folder = user_cards_folder()
    try:
        cards = all_cards()
    except MembenchError as error:
        advice = "correct the file or move it away; no card can be used meanwhile"
        return Check(name="cards folder", state="problem", found=str(error), advice=advice)
    own = len(card_files(folder))
    return Check(name="cards folder", state="ok", found=f"{folder}: {own} of {len(cards)} cards")
