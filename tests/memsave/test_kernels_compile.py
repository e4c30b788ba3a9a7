"""The Triton kernels compile to cubins for real GPUs, which the interpreter cannot tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.memsave.compile_kernels import CASES

ROOT = Path(__file__).resolve().parents[2]
FORWARD = ["_partial_statistics", "_combine_statistics", "_normalise"]
BACKWARD = ["_partial_sums", "_combine_sums", "_gradient"]
CAPABILITIES = [80, 90, pytest.param(100, marks=pytest.mark.slow)]


@cache
def _compiled(capability: int) -> list[dict[str, Any]]:
    """Compile in a process of its own: an interpreted kernel is never compiled in this one."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.memsave.compile_kernels", str(capability)],
        cwd=ROOT, env=plain, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    said = json.loads(ran.stdout.splitlines()[-1])
    if "skipped" in said:
        pytest.skip(said["skipped"])
    compiled: list[dict[str, Any]] = said["compiled"]
    return compiled


def _signatures(case: str) -> dict[str, dict[str, str]]:
    return {c["kernel"]: c["signature"] for c in _compiled(80) if c["case"] == case}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_of_every_case_becomes_a_cubin(capability: int) -> None:
    compiled = _compiled(capability)
    for name, case in CASES.items():
        forward = FORWARD
        if case.use_running:
            forward = ["_normalise"]
        elif case.synchronised:  # its forward pass ends as that of evaluation
            forward = FORWARD[:2]
        assert [c["kernel"] for c in compiled if c["case"] == name] == [*forward, *BACKWARD], name
    assert all(c["is_elf"] and c["capability"] == capability for c in compiled)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_asks_for_more_shared_memory_than_every_gpu_gives(capability: int) -> None:
    """48 KiB a block is what a launch may take anywhere without opting in."""
    assert max(c["shared_bytes"] for c in _compiled(capability)) <= 48 * 1024


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills_registers(capability: int) -> None:
    """Spilled numbers travel through memory that the kernels are there to save."""
    spilled = [(c["case"], c["kernel"]) for c in _compiled(capability) if c["spilled_bytes"]]
    assert spilled == []


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "case",
    [
        "float32 with round sizes",
        "float16 of float32 parameters",
        "float16 all of it, channels last",
        "bfloat16 of float32 parameters",
    ],
)
def test_activations_of_round_sizes_travel_16_bytes_at_a_time(capability: int, case: str) -> None:
    """A thread has 16 elements of each tile: as many accesses of 16 bytes as an element has."""
    itemsize = CASES[case].dtype.itemsize
    made = {c["kernel"]: c for c in _compiled(capability) if c["case"] == case}
    at_least = {
        "_partial_statistics": (itemsize, 0),
        "_normalise": (itemsize, itemsize),
        "_partial_sums": (2 * itemsize, 0),  # z and dz
        "_gradient": (2 * itemsize, itemsize),
    }
    for kernel, (loads, stores) in at_least.items():
        assert made[kernel]["wide_loads"] >= loads, kernel
        assert made[kernel]["wide_stores"] >= stores, kernel


def test_what_is_compiled_has_the_types_that_the_cases_name() -> None:
    """Else the list above might compile one thing many times."""
    mixed = _signatures("float16 of float32 parameters")
    assert mixed["_normalise"]["x"] == "*fp16"
    assert mixed["_normalise"]["weight"] == "*fp32"
    assert mixed["_combine_statistics"]["running_mean"] == "*fp32"
    assert _signatures("bfloat16 all of it, channels last")["_gradient"]["weight"] == "*bf16"
    assert _signatures("float16 in evaluation")["_gradient"]["means"] == "constexpr"  # None
    odd_dz = _signatures("float16 instances without parameters, float32 dz")["_partial_sums"]
    assert (odd_dz["z"], odd_dz["dz"], odd_dz["weight"]) == ("*fp16", "*fp32", "constexpr")


def test_what_is_compiled_has_64_bit_sizes_where_the_cases_name_them() -> None:
    strides = _signatures("float32 through 64-bit strides")["_gradient"]
    assert (strides["stride_n"], strides["places"]) == ("i64", "i32")
    sizes = _signatures("float32 through 64-bit sizes")["_partial_sums"]
    assert (sizes["places"], sizes["channels"]) == ("i64", "constexpr")  # 1 channel
    ones = _signatures("float32 of a single value")["_partial_statistics"]
    assert {ones[k] for k in ("channels", "places", "splits", "tiles_in_a_row")} == {"constexpr"}
