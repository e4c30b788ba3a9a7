"""Every network's training step on fake CUDA tensors: cuDNN's operators, CUDA's autocast lists.

In a process of its own, since the shim must be loaded before torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.predict.shim import ShimUnavailable, build_shim

# (network, options, sides as a suite writes them, technique)
STEPS = [
    ("fcn", {"widths": [4, 8]}, (8, 8, 6), None),
    ("conv_lstm", {"widths": [4, 8]}, (8, 6, 3), None),
    ("conv_lstm", {"widths": [4, 8], "norm": "inplace_abn"}, (8, 6, 3), "checkpoint_steps"),
    ("conv_lstm", {"widths": [4, 8], "frozen_unet": True}, (8, 6, 3), "checkpoint_steps"),
    ("conv_lstm_unet", {"upsampling": "nearest_conv"}, (32, 16), "checkpoint"),
    ("dense_vnet", {}, (8, 16, 24), "checkpoint"),
    ("dense_vnet", {"norm": "inplace_abn"}, (8, 16, 24), None),
    ("light_unet", {}, (8, 16, 24), None),
    ("pocketnet_3d", {"block": "densenet"}, (32, 16, 5), None),
    ("pocketnet_2d", {"block": "resnet", "widths": "pocket"}, (32, 16), "checkpoint"),
]

SCRIPT = """
import json, os, sys
from bench.predict.shim import build_shim, load_shim
load_shim(build_shim())
import torch, torch.cuda.amp.common
from torch._subclasses.fake_tensor import FakeTensorMode
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
from bench.losses import LOSSES
from memsave.mixed_precision import MixedPrecision
from memsave.networks import build, find_network
from memsave.techniques import find_technique, parse_options

def step(name, options, sides, technique, precision):
    spec = find_network(name)
    with torch.device("cuda:0"):
        model = build(name, options)
        image = torch.randn(spec.image_shape(options, 2, sides))
        shape = spec.target_shape(options, 2, sides)
        if spec.target == "classes":
            target = torch.randint(spec.output_channels(options), shape)
        else:
            target = torch.randint(2, shape, dtype=torch.float32)
    if technique is not None:
        use = find_technique(technique)
        model = use.module(model, parse_options(use, {}))
    mixed = MixedPrecision(precision)
    with mixed.forward():
        loss = LOSSES[spec.loss](model(image), target)
    mixed.backward(loss)
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or parameter.grad.device.type == "cuda"
    return [str(loss.device), str(loss.dtype)]

for given in json.loads(sys.argv[1]):
    with FakeTensorMode():
        said = {precision: step(*given, precision) for precision in ("fp32", "fp16", "bf16")}
    print(json.dumps(said), flush=True)
os._exit(0)  # autograd's thread for cuda:0 may abort the interpreter's own way out
"""


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """One process for all steps, since importing torch is most of its time."""
    try:
        build_shim()
    except ShimUnavailable as error:
        pytest.skip(f"no CUDA shim here: {error}")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(STEPS)],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("index", range(len(STEPS)), ids=[f"{s[0]}-{s[3]}" for s in STEPS])
def test_a_training_step_runs_in_every_precision(
    index: int, done: subprocess.CompletedProcess[str]
) -> None:
    lines = done.stdout.splitlines()
    assert len(lines) > index, done.stderr
    on_cuda = ["cuda:0", "torch.float32"]
    assert json.loads(lines[index]) == {"fp32": on_cuda, "fp16": on_cuda, "bf16": on_cuda}
