"""membench held to its own standard: no suite needs a byte more than its committed baseline.

``nox -s baseline`` writes the baselines anew; the change of each figure then stands in the diff.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.baseline import read_baseline
from bench.environment import read_environment
from bench.predict.shim import choose_tracer

ROOT = Path(__file__).resolve().parents[2]
BASELINES = ROOT / "results" / "baselines"
FAST = ("table1", "pocketnet_3d")  # seconds each; the others are checked by nox -s slow


def skip_unless_made_alike(suite: str) -> None:
    """Skip, visibly, where torch or the tracer is not the one that the baseline was made with."""
    origin = read_baseline(BASELINES / f"{suite}.json")[0].origin
    ours = {"torch": read_environment().torch, "tracer": choose_tracer()[0]}
    for name, value in ours.items():
        if getattr(origin, name) != value:
            pytest.skip(f"the baseline is of {name} {getattr(origin, name)}, here is {value}")


@pytest.mark.parametrize("suite", FAST)
def test_a_baseline_is_of_the_torch_that_is_pinned(suite: str) -> None:
    pinned = next(
        line.removeprefix("torch==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    figures = read_baseline(BASELINES / f"{suite}.json")
    assert {one.origin.torch.partition("+")[0] for one in figures} == {pinned}
    assert {(one.origin.evidence, one.origin.tracer) for one in figures} == {
        ("predicted", "cuda-shim")
    }


@pytest.mark.parametrize(
    "suite",
    [
        pytest.param(path.stem, marks=() if path.stem in FAST else pytest.mark.slow)
        for path in sorted(BASELINES.glob("*.json"))
    ],
)
def test_no_suite_needs_a_byte_more_than_its_baseline(suite: str, tmp_path: Path) -> None:
    skip_unless_made_alike(suite)
    membench = [sys.executable, "-m", "bench"]
    run = [*membench, "run", suite, "--device", "predict", "--results", str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    baseline = str(BASELINES / f"{suite}.json")
    check = [*membench, "check", str(tmp_path), "--baseline", baseline, "--tolerance", "0"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nif it must be so: nox -s baseline"
