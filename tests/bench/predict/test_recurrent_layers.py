"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and the cells on fake CUDA tensors: what each call allocates.

In a process of its own, since the shim must be loaded before torch. Sizes are of layers from 32 to
64 numbers over 6 steps of 4 sequences: 24 cells.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.predict.recurrent_layers import ESTIMATED
from bench.predict.shim import ShimUnavailable, build_shim
from bench.predict.tracer import TraceError, Tracer

_SCRIPT = """
import json
from bench.predict.shim import build_shim, load_shim
load_shim(build_shim())
import torch, torch.cuda.amp.common
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from bench.predict.cuda_kernels import register_cuda_kernels
from bench.predict.tracer import Tracer
register_cuda_kernels()
register_cuda_kernels()
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda including_emulation=True: True

def run(name, *, cudnn=True, amp=False, training=True, dtype=torch.float32, **options):
    with FakeTensorMode(), Tracer("cuda") as tracer, torch.device("cuda:0"):
        sizes = lambda begun: [e[2] for e in tracer.trace.events[begun:] if e[0] == "alloc"]
        layer = getattr(nn, name)(32, 64, dtype=dtype, **options).train(training)
        weights = {w.untyped_storage()._cdata: w.untyped_storage().nbytes()
                   for w in layer.parameters()}
        cell = name.endswith("Cell")
        x = torch.empty((4, 32) if cell else (4, 6, 32), dtype=dtype, requires_grad=True)
        begun = len(tracer.trace.events)
        with torch.backends.cudnn.flags(enabled=cudnn), torch.autocast("cuda", enabled=amp):
            y = layer(x)
        y = y if isinstance(y, torch.Tensor) else y[0]
        forward, begun = sizes(begun), len(tracer.trace.events)
        if training:
            y.backward(torch.empty(y.shape, dtype=y.dtype))
        gradients = {w.grad.untyped_storage()._cdata for w in layer.parameters() if training}
        return dict(forward=forward, backward=sizes(begun), weights=sorted(weights.values()),
                    shape=list(y.shape), dtype=str(y.dtype), gradients=len(gradients),
                    sites=sorted({s.operator for s in tracer.trace.sites}),
                    lines=sorted({s.source_line for s in tracer.trace.sites}),
                    estimated=sorted(tracer.trace.estimated))

first = {"batch_first": True}
print(json.dumps({
    "LSTM": run("LSTM", **first),
    "GRU": run("GRU", **first),
    "RNN": run("RNN", **first),
    "deep": run("LSTM", num_layers=2, bidirectional=True, proj_size=16, dropout=0.1, **first),
    "eval": run("LSTM", training=False, **first),
    "amp": run("LSTM", amp=True, **first),
    "native GRU": run("GRU", cudnn=False, **first),
    "native LSTM": run("LSTM", cudnn=False, **first),
    "GRUCell": run("GRUCell"),
    "bare cell": run("GRUCell", bias=False),
}))
"""
CELLS = 6 * 4
X, Y, H = CELLS * 32 * 4, CELLS * 64 * 4, 4 * 64 * 4  # input, output, one state


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    try:
        build_shim()
    except ShimUnavailable as error:
        pytest.skip(f"no CUDA shim here: {error}")
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_an_lstm_is_one_call_of_cudnn_with_its_reserve(runs: dict[str, Any]) -> None:
    run = runs["LSTM"]

    # Two states of zeros; the input turned; output, states, the workspace of 4 gates, and a
    # reserve of 4 gates, cell and output.
    gates = 4 * Y
    assert run["forward"] == [H, H, X, Y, H, H, gates, gates + 2 * Y]
    assert run["shape"] == [4, 6, 64]
    assert run["estimated"] == [ESTIMATED]
    assert "aten._cudnn_rnn.default" in run["sites"]
    assert not any("recurrent_layers" in line for line in run["lines"])


def test_an_lstms_weights_lie_in_one_buffer_and_so_do_their_gradients(
    runs: dict[str, Any],
) -> None:
    run, weights = runs["LSTM"], (256 * 32 + 256 * 64 + 2 * 256) * 4

    assert run["weights"] == [weights]
    assert run["gradients"] == 1
    # The output's gradient as given; of the two states, for which nobody asked; the turned copies
    # of input and gradient; the gradients of input and states; a workspace; the input once more;
    # the weights' gradients; and the input's as it is kept, which came turned.
    given, zeros = [Y], [H, H]
    assert run["backward"] == [*given, *zeros, X, Y, X, H, H, 4 * Y, X, weights, X]


def test_a_gru_and_a_plain_layer_keep_what_their_cells_are_made_of(runs: dict[str, Any]) -> None:
    assert runs["GRU"]["forward"] == [H, X, Y, H, 3 * Y, 5 * Y]
    assert runs["RNN"]["forward"] == [H, X, Y, H, Y, 2 * Y]


def test_layers_directions_and_projections_all_count(runs: dict[str, Any]) -> None:
    run = runs["deep"]
    states, out = 4 * 4 * 16 * 4, CELLS * 2 * 16 * 4
    cells = 4 * 4 * 64 * 4
    reserve = CELLS * 2 * 2 * (5 * 64 + 16) * 4
    assert run["forward"] == [states, cells, X, out, states, cells, 2 * 4 * Y, reserve]
    assert run["shape"] == [4, 6, 32]


def test_without_training_there_is_no_reserve(runs: dict[str, Any]) -> None:
    assert runs["eval"]["forward"] == [H, H, X, Y, H, H, 4 * Y]


def test_autocast_copies_the_weights_into_one_buffer_in_half(runs: dict[str, Any]) -> None:
    run, weights = runs["amp"], (256 * 32 + 256 * 64 + 2 * 256) * 2

    assert run["dtype"] == "torch.float16"
    halves = [X // 2, H // 2, H // 2]  # input and states cast, before the input is turned
    assert run["forward"][:6] == [H, H, weights, *halves]
    assert run["forward"][-1] == 6 * Y // 2
    assert run["gradients"] == 4  # in float32, each copied out of the buffer


@pytest.mark.parametrize("name", ["native GRU", "native LSTM"])
def test_without_cudnn_a_layer_runs_cell_by_cell(runs: dict[str, Any], name: str) -> None:
    run = runs[name]
    assert run["estimated"] == []
    assert any("_thnn_fused_" in site for site in run["sites"])
    assert run["shape"] == [4, 6, 64]
    assert run["gradients"] in (3, 4)  # both biases of the LSTM's cell share one


def test_a_grus_cell_keeps_five_numbers_of_each_and_sums_its_biases(
    runs: dict[str, Any],
) -> None:
    gates = 4 * 3 * 64 * 4
    # The state of zeros, the two products without their biases, the new state and the workspace.
    assert runs["GRUCell"]["forward"][-2:] == [H, 5 * H]
    assert runs["GRUCell"]["forward"].count(gates) == 2
    assert runs["GRUCell"]["backward"][:4] == [H, gates, gates, H]
    assert runs["GRUCell"]["backward"][4:6] == [3 * 64 * 4] * 2
    assert 3 * 64 * 4 not in runs["bare cell"]["backward"]


def test_a_packed_sequence_is_told_to_be_padded() -> None:
    layer, packing = torch.nn.LSTM(8, 8), torch.nn.utils.rnn.pack_padded_sequence
    with FakeTensorMode(), Tracer("cpu"), pytest.raises(TraceError) as caught:
        layer(packing(torch.empty(6, 4, 8), torch.empty(4, dtype=torch.int64)))

    message = str(caught.value)
    assert "test_recurrent_layers.py" in message
    assert "give the layer the padded tensor itself" in message
    assert ".item()" not in message
