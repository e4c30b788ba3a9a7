"""What a process that traces answers, in processes of their own: the shim comes before torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.predict.shim import ShimUnavailable, build_shim

ROOT = Path(__file__).resolve().parents[3]
BEGIN = "from bench.predict.tracing_process import become; become({tracer!r})\n"
COPIES = """
import copy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode() as mode, torch.device({device!r}):
    norm = torch.nn.BatchNorm3d(8)
    for _ in range(20):
        copied = copy.deepcopy(norm)
        assert all(tensor.fake_mode is mode for tensor in copied.state_dict().values())
        assert copied.weight is not norm.weight
    # Of two modes, this would be refused.
    print(tuple((copied.weight + norm.weight).shape), copied.num_batches_tracked.device)
"""
AMP = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode(), torch.device("cuda:0"), torch.autocast("cuda", dtype=torch.bfloat16):
    print(torch.nn.Linear(3, 4)(torch.ones(2, 3)).dtype, torch.cuda.is_bf16_supported())
"""


@pytest.fixture(scope="module")
def shim() -> Path:
    try:
        return build_shim()
    except ShimUnavailable as error:
        pytest.skip(f"the shim cannot be built here: {error}")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(("tracer", "device"), [("cuda-shim", "cuda:0"), ("cpu", "cpu")])
def test_a_copied_module_belongs_to_the_mode_of_its_original(tracer: str, device: str) -> None:
    done = run(BEGIN.format(tracer=tracer) + COPIES.format(device=device))
    assert (done.returncode, done.stdout) == (0, f"(8,) {device}\n"), done.stderr


@pytest.mark.usefixtures("shim")
def test_autocast_is_there_on_the_fake_gpu() -> None:
    done = run(BEGIN.format(tracer="cuda-shim") + AMP)
    assert (done.returncode, done.stdout) == (0, "torch.bfloat16 True\n"), done.stderr


@pytest.mark.usefixtures("shim")
def test_torch_that_is_there_already_is_an_error() -> None:
    done = run("import torch\n" + BEGIN.format(tracer="cuda-shim"))
    assert done.returncode == 1
    assert "must be loaded before torch" in done.stderr
