"""memsave in an environment that has torch and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Runs in a process of its own. Everything that is not Python's, torch's or memsave's is refused,
# numpy too: torch does not require it. The names are those that torch's own metadata requires.
SCRIPT = """
import importlib.machinery, importlib.metadata, re, sys, warnings
distributions, modules = ["torch"], {"torch", "torchgen", "functorch", "memsave"}
owners = {}
for module, names in importlib.metadata.packages_distributions().items():
    for name in names:
        owners.setdefault(name.lower().replace("_", "-"), set()).add(module)
while distributions:
    for requirement in importlib.metadata.requires(distributions.pop()) or ():
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")
        if "extra ==" not in requirement and owners.get(name, set()) - modules:
            modules |= owners[name]
            distributions.append(name)

class OnlyTorch(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        root = name.partition(".")[0]
        known = modules | sys.stdlib_module_names
        if root not in known and not root.startswith("_sysconfigdata"):  # Python's own too
            return None
        return super().find_spec(name, path, target)

own = (importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter)
sys.meta_path[:] = [*own, OnlyTorch]
for refused in ("numpy", "typer", "bench"):
    try:
        __import__(refused)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{refused} was not refused")

warnings.simplefilter("ignore")  # torch warns that there is no numpy
import torch
import memsave
model = memsave.FCN(widths=(4, 8), block="ccblock", norm="inplace_abn")
memsave.checkpoint_block(model.encoder[0])
precision = memsave.MixedPrecision("bf16", "cpu")
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
torch.manual_seed(0)
image = torch.randn(1, 1, 8, 8, 8)
losses = []
for _ in range(10):
    optimizer.zero_grad()
    with precision.forward():
        loss = torch.nn.functional.cross_entropy(model(image), (image[:, 0] > 0).long())
    precision.backward(loss)
    precision.step(optimizer)
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print("trained")
"""


def test_memsave_imports_and_trains_with_torch_alone() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "trained", done.stderr
