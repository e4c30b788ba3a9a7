"""Programs for fake CUDA tensors, run in a process of their own: the shim comes before torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from bench.predict.shim import ShimUnavailable, build_shim

__all__ = ["printed_by"]


def printed_by(programs: str) -> Any:
    """Return the JSON in the last line that ``programs`` print; skip where there is no shim."""
    try:
        build_shim()
    except ShimUnavailable as error:
        pytest.skip(str(error))
    command = [sys.executable, "-W", "ignore", "-c", programs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
