"""What a wheel holds: a user who installs membench has no source tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_wheel_carries_suites_cards_the_shims_source_and_types(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("membench-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"bench/suites/{path.name}" for path in (ROOT / "suites").glob("*.yaml")}
    cards = {f"bench/predict/cards/{p.name}" for p in (ROOT / "bench/predict/cards").glob("*.json")}
    assert shipped
    assert len(cards) > 10
    assert names >= shipped | cards | {
        "bench/predict/fake_cuda.cpp",
        "bench/py.typed",
        "memsave/py.typed",
    }
    assert not [name for name in names if name.startswith(("tests/", "results/", "reports/"))]
