"""membench on the stand-in GPU: measured, watched and refused through the real torch and pynvml.

Needs an interpreter with PyPI's torch for CUDA 13 and membench's dependencies, which
``MEMBENCH_CUDA_PYTHON`` names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.predict.cards import find_card
from tests.stand_in.build import build
from tests.stand_in.pose import DEFAULT_CARD, NAME, environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
CONTEXT = 400 * MIB
CASE = "fcn/ccblock+inplace_abn/96x96x96/train"
HOLD = (
    f"import sys, torch; x = torch.empty(3 << 30, dtype=torch.uint8, device='cuda'); "
    f"print('held', flush=True); sys.stdin.read(); assert x.nbytes == {3 << 30}"
)


class StandIn:
    """One stand-in GPU, which the processes of a test share."""

    def __init__(self, python: str, state: Path) -> None:
        self.python, self.state = python, state
        self.libraries = build(python)

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        given = {**os.environ, "STANDIN_CONTEXT_BYTES": str(CONTEXT), **settings}
        given.pop("TRITON_INTERPRET", None)  # which tests/conftest.py sets where there is no GPU
        return subprocess.Popen(
            [self.python, *arguments],
            env=environment(self.libraries, self.state, DEFAULT_CARD, given),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **settings: str) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr."""
        process = self.start(*arguments, **settings)
        out, error = process.communicate(timeout=300)
        return process.returncode, out, error

    def measure(self, *options: str, **settings: str) -> dict[str, Any]:
        """Measure the one case and return its record."""
        results = str(self.state / "results")
        command = ("-m", "bench", "run", "table1", "--case", CASE, "--device", "cuda", "--json")
        _, out, error = self.run(*command, "--results", results, *options, **settings)
        assert out, error
        record: dict[str, Any] = json.loads(out)
        return record


@pytest.fixture
def gpu(tmp_path: Path) -> StandIn:
    python = os.environ.get("MEMBENCH_CUDA_PYTHON")
    if not python:
        pytest.skip("needs MEMBENCH_CUDA_PYTHON, an interpreter with torch for CUDA 13")
    return StandIn(python, tmp_path)


@pytest.fixture
def neighbour(gpu: StandIn) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds 3 GiB."""
    process = gpu.start("-c", HOLD)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_command_ends_with_the_interpreters_exit_code(gpu: StandIn) -> None:
    script = "import sys, torch; print(torch.cuda.get_device_name()); sys.exit(7)"
    command = [sys.executable, "-m", "tests.stand_in", "--python", gpu.python, "--", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, f"{NAME}\n")


@pytest.mark.parametrize("pids", ["own", "host", "hidden"])
def test_a_record_says_stand_in_and_holds_the_context_however_pids_are_listed(
    gpu: StandIn, pids: str
) -> None:
    """In a container NVML lists a process by the host's number, or not at all."""
    record = gpu.measure(STANDIN_PIDS=pids)

    assert (record["status"], record["evidence"]) == ("ok", "measured"), record["reason"]
    assert record["card"] == "standin-141gb"
    assert (record["environment"]["gpu"], record["environment"]["driver"]) == (NAME, "stand-in")
    assert record["parts"]["context_bytes"] == CONTEXT
    assert record["process_bytes"] == record["peak_reserved_bytes"] + CONTEXT
    told = any("less what was in use before" in note for note in record["environment"]["notes"])
    assert told == (pids != "own")


def test_a_smaller_device_is_a_result_of_its_own(gpu: StandIn) -> None:
    record = gpu.measure(STANDIN_MEMORY_BYTES=str(1024 * MIB))

    assert record["status"] == "oom"
    assert record["reason"].startswith("out of memory in ")
    assert record["card"] == "standin-1gb"


def test_a_smaller_card_caps_the_allocator_and_what_was_reached_is_kept(gpu: StandIn) -> None:
    """torch's allocator refuses at the card's memory less its context; the device has 141 GB."""
    fits = gpu.measure("--card", "rtx4060-8gb")
    refused = gpu.measure("--card", "budget-1gb")

    smaller = find_card("rtx4060-8gb")
    assert (fits["status"], fits["evidence"]) == ("ok", "measured"), fits["reason"]
    assert (fits["card"], fits["capped_to"]) == ("standin-141gb", "rtx4060-8gb")
    assert fits["capacity_bytes"] == smaller.memory_bytes - smaller.context_bytes
    assert (refused["status"], refused["capped_to"]) == ("oom", "budget-1gb")
    assert refused["reason"].startswith("out of memory in ")
    assert 0 < refused["peak_reserved_bytes"] <= refused["capacity_bytes"] < 1024 * MIB


def test_a_kernel_that_faults_is_a_failed_case(gpu: StandIn) -> None:
    record = gpu.measure(STANDIN_FAULT_AT="500")

    assert record["status"] == "failed"
    assert "an illegal memory access was encountered" in record["reason"]


@pytest.mark.usefixtures("neighbour")
def test_another_process_is_refused_or_recorded(gpu: StandIn) -> None:
    run = ("-m", "bench", "run", "table1", "--case", CASE, "--device", "cuda", "--exclusive")
    code, _, error = gpu.run(*run, "--results", str(gpu.state / "refused"))
    assert code == 2
    assert "is not ours alone: process " in error
    assert "(3.4 GiB)" in error  # 3 GiB and the context

    record = gpu.measure()
    assert record["status"] == "ok"
    assert any("(3.4 GiB)" in note for note in record["environment"]["notes"])


def test_what_a_killed_process_held_is_free(gpu: StandIn, neighbour: subprocess.Popen[str]) -> None:
    script = "from bench import nvml; (d,) = nvml.devices(); print(nvml.device_used_bytes(d.uuid))"
    assert gpu.run("-c", script)[1] == f"{(3 << 30) + CONTEXT}\n"
    neighbour.kill()
    neighbour.wait()
    assert gpu.run("-c", script)[1] == "0\n"


def test_devices_are_chosen_by_number_and_by_uuid(gpu: StandIn) -> None:
    script = (
        "import torch; from bench import nvml; torch.empty(1 << 30, dtype=torch.uint8, "
        "device='cuda:0'); print([nvml.device_used_bytes(d.uuid) for d in nvml.devices()])"
    )
    uuids = "from bench import nvml; print(*(d.uuid for d in nvml.devices()))"
    names = gpu.run("-c", uuids, STANDIN_DEVICES="3")[1].split()
    for chosen in ("2", names[2]):
        out = gpu.run("-c", script, STANDIN_DEVICES="3", CUDA_VISIBLE_DEVICES=chosen)[1]
        assert out == f"[0, 0, {(1 << 30) + CONTEXT}]\n"


def test_half_precision_attention_is_cudnns_and_comes_back(gpu: StandIn) -> None:
    """On compute capability 9.0 torch prefers cuDNN's, and says so in the graph's node."""
    script = (
        "import torch; from torch.nn import functional as F\n"
        "from torch.nn.attention import SDPBackend, sdpa_kernel\n"
        "q = torch.randn(1, 4, 128, 64, device='cuda', dtype=torch.float16, requires_grad=True)\n"
        "with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):\n"
        "    y = F.scaled_dot_product_attention(q, q, q)\n"
        "y.sum().backward()\n"
        "print(type(y.grad_fn).__name__, tuple(q.grad.shape))"
    )
    code, out, error = gpu.run("-c", script)
    assert out == "ScaledDotProductCudnnAttentionBackward0 (1, 4, 128, 64)\n", error
    assert code == 0, error


def test_the_shims_prediction_is_that_of_a_machine_without_a_gpu(gpu: StandIn) -> None:
    predict = ("-m", "bench", "run", "table1", "--case", CASE, "--device", "predict", "--json")
    command = (*predict, "--card", "h200-141gb", "--results", str(gpu.state / "results"))
    here = json.loads(gpu.run(*command, MEMBENCH_TRACER="cuda-shim")[1])
    elsewhere = json.loads(gpu.run(*command, CUDA_VISIBLE_DEVICES="")[1])

    assert (here["status"], here["tracer"]) == ("ok", "cuda-shim"), here["reason"]
    assert elsewhere["tracer"] == "cuda-shim"
    assert here["phases"] == elsewhere["phases"]


SUITE = """
title: Two small networks
card: h200-141gb
matrix:
  networks:
    - {{name: fcn, variant: small, widths: [4, 8]}}
    - {{name: fcn, variant: small+abn, widths: [4, 8], norm: inplace_abn}}
  precision: [fp32, fp16]
  shapes: [{side}x{side}x{side}]
"""
WITH_CARDS = (
    "import os, runpy, sys; os.environ['MEMBENCH_CARDS'] = sys.argv.pop(1); "
    "runpy.run_module('bench', run_name='__main__')"
)


def test_calibration_gives_back_the_workspace_and_predictions_hold_it_to_the_byte(
    gpu: StandIn,
) -> None:
    """Every plan of cuDNN's is told to ask for 42 MiB. Of a shape that was not calibrated the
    workspace is extrapolated, in proportion, and the case stands apart."""
    workspace = 42 * MIB
    settings = {"STANDIN_WORKSPACE_BYTES": str(workspace)}
    suites = {side: gpu.state / f"side{side}.yaml" for side in (32, 48)}
    for side, path in suites.items():
        path.write_text(SUITE.format(side=side))
    cards, results = str(gpu.state / "calibrated"), str(gpu.state / "results")

    calibrate = ("-m", "bench", "calibrate", "-o", cards, "--hold-out", "0")
    code, _, error = gpu.run(*calibrate, "--suite", str(suites[32]), **settings)
    assert code == 0, error
    for path in suites.values():
        run = ("-m", "bench", "run", str(path), "--device", "cuda", "--results", results)
        code, _, error = gpu.run(*run, **settings)
        assert code == 0, error
    code, out, error = gpu.run("-c", WITH_CARDS, cards, "fidelity", results, "--json", **settings)

    assert code == 0, error
    section = json.loads(Path(cards, "standin-141gb.json").read_text())["calibration"]
    assert section["complete"] is True
    assert {row["workspace_bytes"] for row in section["convolutions"]} == {workspace}
    assert section["context"]["networks_bytes"] == {"fcn/fp32": CONTEXT, "fcn/fp16": CONTEXT}
    found = [json.loads(line) for line in out.splitlines()]
    errors = ("error_requested", "error_allocated", "error_reserved", "error_process")
    calibrated = [one for one in found if not one["heldout"]]
    assert [[one[name] for name in errors] for one in calibrated] == [[0.0] * 4] * 4
    held_out = [one["case"] for one in found if one["heldout"]]
    assert len(held_out) == 4
    assert all("48x48x48" in case for case in held_out)


def test_doctor_finds_all_of_it(gpu: StandIn) -> None:
    code, out, error = gpu.run("-m", "bench", "doctor")

    assert code == 0, error
    assert f"GPU: ok: {NAME}, " in out
    assert "NVML: ok: driver stand-in" in out
