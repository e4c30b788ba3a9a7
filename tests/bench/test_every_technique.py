"""Every technique of the table can be named in a suite, and given to a network of one's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memsave
from bench.build_workload import build_workload
from memsave.errors import OptionError
from memsave.techniques import TECHNIQUES
from tests.bench.suite_files import load, refusal
from tests.memsave.test_tiled_unets import OwnUNet

# What they need on networks this small, or of a class that names no blocks.
SUITE_OPTIONS = {"tiled_levels": "slabs: 2", "offload": "minimum_bytes: 0"}
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "checkpoint": {"blocks": ["down.0", "back.0"]},
    "checkpoint_selective": {"blocks": ["down.0"]},
    "offload": {"minimum_bytes": 0},
    "compress_activations": {"minimum_bytes": 0, "format": "bf16"},
    "tiled_levels": {"slabs": 2},
}
NORMS: dict[str, Any] = {
    "inplace_group_norm": lambda channels: nn.GroupNorm(1, channels),
    "inplace_instance_norm": lambda channels: nn.InstanceNorm3d(channels, affine=True),
}
REFUSED = {
    "checkpoint_steps": "OwnUNet takes no steps to checkpoint: use this technique on a recurrent",
    "checkpoint_budget": "OwnUNet is no nn.Sequential and names no blocks: give its class a method",
}

SUITE = """
title: every technique
card: rtx3070-8gb
training: {{loss: {loss}}}
include:
  - network: {network}
    variant: it
    shape: 8x8x8
    widths: [4, 8]
    norm: {norm}
    {block}
    techniques: [{{name: {name}, {options}}}]
"""


@pytest.mark.parametrize("block", ["ccblock", "reversible"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_suite_may_name_it(name: str, block: str, tmp_path: Path) -> None:
    """One step of a row; reversible blocks beside every technique but tiles, which refuse them."""
    recurrent = name == "checkpoint_steps"
    text = SUITE.format(
        network="conv_lstm" if recurrent else "fcn",
        loss="binary_cross_entropy" if recurrent else "cross_entropy+dice",
        norm="batch_norm" if recurrent else "batch_norm_leaky_relu",
        block="" if recurrent else f"block: {block}",
        name=name,
        options=SUITE_OPTIONS.get(name, ""),
    )
    if (name, block) == ("tiled_levels", "reversible"):
        said = refusal(tmp_path, text)
        assert "techniques[0]: ReversibleSequence in encoder.0 cannot run slab by slab" in said
        return
    (case,) = load(tmp_path, text).own_cases
    workload = build_workload(case, lambda _: None, "cpu")
    before = [p.detach().clone() for p in workload.model.parameters()]
    workload.step(lambda _: None)
    after = workload.model.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", [name for name in TECHNIQUES if name not in REFUSED])
def test_apply_gives_it_to_a_network_of_one_s_own(name: str) -> None:
    """A step, after which every parameter has moved: its gradient came through."""
    torch.manual_seed(0)
    network = OwnUNet(norm=NORMS.get(name, nn.BatchNorm3d))
    image = torch.randn(1, 2, 4, 4, 8)
    entry = (name, OWN_OPTIONS.get(name, {}))
    applied = memsave.apply(network, [entry], example_inputs=image)
    model = applied.model
    optimizer = applied.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with applied.step():
        torch.autograd.backward(model(image).square().mean())
    optimizer.step()
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    # Before a norm a convolution's bias has no gradient but rounding, which may be 0.
    assert not [n for n in still if not re.search(r"(down|back)\.\d\.[03]\.bias", n)]


@pytest.mark.parametrize("name", REFUSED)
def test_apply_refuses_it_in_one_line(name: str) -> None:
    """A network without steps, and one that does not name its blocks: with what to do."""
    with pytest.raises(OptionError, match=REFUSED[name]) as raised:
        memsave.apply(OwnUNet(norm=nn.BatchNorm3d), [name])
    assert "\n" not in str(raised.value)


def test_the_floor_has_reversible_blocks_alone_and_with_others() -> None:
    """Rows of the shipped suite."""
    from bench.suite import load_suite

    cases = load_suite("floor").own_cases
    rows = [c for c in cases if c.network_options.get("block") == "reversible"]
    assert {tuple(use.name for use in row.techniques) for row in rows} == {
        (),
        ("recomputed_norm_act",),
        ("recomputed_norm_act", "offload"),
    }
