"""Runs of pytest with the plugin, in a process of their own, and what their report says."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

__all__ = ["NETWORK", "Outcome", "PluginRun", "run_pytest"]

ROOT = Path(__file__).resolve().parents[2]
# A network of two blocks; ``KEEP`` makes the second of them keep one activation more.
NETWORK = """\
import torch
from torch import Tensor, nn

KEEP = False


class Block(nn.Module):
    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(8, 8, 3, padding=1)
        self.keeps = keeps

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if KEEP and self.keeps:
            self.kept = y * 2
        return torch.relu(y)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 1)
        self.first = Block(False)
        self.second = Block(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))


def step(net: nn.Module) -> None:
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(1, 1, 32, 32, 32, device="cuda")).sum().backward()
    optimizer.step()
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test: passed, failed, error or skipped; and why."""

    outcome: str
    text: str
    properties: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PluginRun:
    """A finished run of pytest."""

    code: int
    output: str
    tests: dict[str, Outcome]


def run_pytest(folder: Path, *arguments: str, **environment: str) -> PluginRun:
    """Run pytest with the plugin in ``folder``."""
    installed = entry_points(group="pytest11", name="membench")
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"),
            *(() if installed else ("-p", "bench.pytest_plugin")),
            *(f"--junitxml={report}", "-o", "junit_family=xunit2", *arguments),
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": "",  # predicted on a machine with a GPU too
            "COLUMNS": "200",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return PluginRun(done.returncode, done.stdout, _outcomes(report) if report.exists() else {})


def _outcomes(report: Path) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome, text = "passed", ""
        for kind in ("failure", "error", "skipped"):
            element = case.find(kind)
            if element is not None:
                outcome = "failed" if kind == "failure" else kind
                text = f"{element.get('message', '')}\n{element.text or ''}"
        properties = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        found[case.get("name", "")] = Outcome(outcome, text, properties)
    return found
