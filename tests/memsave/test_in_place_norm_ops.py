"""The in-place norms' two operators: what checkers, tracers and compilers see of them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.predict.shim import ShimUnavailable, build_shim
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_group_norm import InPlaceGroupNorm
from memsave.in_place_norm_ops import in_place_norm_, in_place_norm_backward_

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (1e-5, "leaky_relu", 0.01)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_torchs_own_checks_pass(groups: int | None, dtype: torch.dtype) -> None:
    """Schema (what is written to, what aliases), fake against real, and the compiler's view."""
    x, dz = torch.randn(2, 4, 5, 3).to(dtype), torch.randn(2, 4, 5, 3).to(dtype)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, rstd = (torch.rand(4, dtype=statistic) + 0.5 for _ in range(3))
    running = (None, None) if groups else (torch.zeros(4), torch.ones(4))
    if dtype == torch.float64 and not groups:
        running = (torch.zeros(4).double(), torch.ones(4).double())
    forward: Any = in_place_norm_
    backward: Any = in_place_norm_backward_
    torch.library.opcheck(
        forward, (x.clone(), weight, bias, *running, groups, False, 0.1, *SETTINGS)
    )
    torch.library.opcheck(backward, (x, dz, weight, bias, rstd, groups, False, *SETTINGS))


# torch's own tracing of an autograd function, on Python 3.11, not ours
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inductor's
@pytest.mark.parametrize("norm", [InPlaceABN(4), InPlaceGroupNorm(2, 4)], ids=["abn", "group"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_gives_the_same_in_one_graph(norm: nn.Module, backend: str) -> None:
    """Inductor leaves the two operators and the convolutions as they are, so to the bit as well."""
    torch.manual_seed(0)
    norm = copy.deepcopy(norm)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), norm, nn.Conv1d(4, 2, 1))
    image = torch.randn(2, 3, 9)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results: list[list[Tensor]] = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(image).square().sum()
        torch.autograd.backward(loss)
        grads = [p.grad for p in model.parameters()]
        results.append([loss.detach(), *(g.clone() for g in grads if g is not None)])
    assert len(results[0]) == 7
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


# Runs in a process of its own, since the shim must be there before torch.
TRACE = """
import json, os, sys
from bench.predict.shim import build_shim, load_shim
load_shim(build_shim())
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from bench.predict.tracer import Tracer
import memsave

def sizes(tracer, since):
    return [e[2] for e in tracer.trace.events[since:] if e[0] == "alloc"]

tracer = Tracer("cuda")
dtype = getattr(torch, sys.argv[1])
with FakeTensorMode(), tracer:
    x = torch.randn(1, 64, 96, 96, 96, device="cuda:0", dtype=dtype, requires_grad=True)
    with torch.device("cuda:0"):
        norm = eval(sys.argv[2])
    y = x * 1
    since = len(tracer.trace.events)
    z = norm(y)
    forward = sizes(tracer, since)
    dz = torch.ones_like(z)
    since = len(tracer.trace.events)
    torch.autograd.backward(z, dz, inputs=[norm.weight])
    print(json.dumps([forward, sizes(tracer, since)]), flush=True)
os._exit(0)  # autograd's thread for cuda:0 may abort the interpreter's own way out
"""

# 96^3 places are 216 tiles a row, dealt out to 31 programs: partial sums of two numbers each.
PARTIALS = 2 * 64 * 31


@pytest.mark.parametrize(
    ("norm", "statistics"),
    [("memsave.InPlaceABN(64)", 64), ("memsave.InPlaceGroupNorm(8, 64)", 8)],
    ids=["abn", "group"],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_traced_step_on_cuda_allocates_the_kernels_buffers_and_nothing_else(
    dtype: str, norm: str, statistics: int
) -> None:
    """Forward: 1/std; partials and means. Backward: two gradients; partials and two means."""
    try:
        build_shim()
    except ShimUnavailable as error:
        pytest.skip(f"no CUDA shim here: {error}")
    done = subprocess.run(
        [sys.executable, "-c", TRACE, dtype, norm],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    forward, backward = json.loads(done.stdout)
    assert forward == [4 * statistics, 4 * (PARTIALS + statistics)]
    assert backward == [4 * 64, 4 * 64, 4 * (PARTIALS + 2 * statistics)]
