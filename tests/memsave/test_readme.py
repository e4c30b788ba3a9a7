"""The README's code runs as it stands there, but on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import memsave
from memsave.checkpoint import _Checkpointed


def test_the_code_of_the_readme_runs() -> None:
    text = (Path(memsave.__file__).parent / "README.md").read_text()
    first, applied, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model = memsave.FCN(widths=(4, 8))
    before = [p.detach().clone() for p in model.parameters()]
    names = {
        "model": model,
        "loader": [(torch.randn(1, 1, 4, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.long))],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": nn.CrossEntropyLoss(),
    }
    assert '"fp16"' in first
    exec(first.replace('"fp16"', '"fp16", "cpu"'), names)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    names["model"] = memsave.FCN(widths=(4, 8), norm="batch_norm_leaky_relu")
    names["image"] = torch.randn(1, 1, 4, 4, 4)
    exec(applied, names)
    assert len(names["applied"].replaced) == 6  # type: ignore[attr-defined]
    exec(second, names)
    made = names["model"]
    assert isinstance(made, memsave.FCN)
    assert sum(isinstance(m, _Checkpointed) for m in made.modules()) == 7
