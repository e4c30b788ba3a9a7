"""What all tests share: Triton's interpreter where there is no GPU, no times on a stand-in GPU.

Without a GPU, Triton's kernels run under its interpreter, which must be asked for in advance. On a
stand-in GPU (``tests/stand_in``) what is marked ``needs_kernels`` is skipped: none runs there.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is first imported


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs kernels where the GPU runs none."""
    if item.get_closest_marker("needs_kernels") is None or not torch.cuda.is_available():
        return
    if torch.cuda.get_device_name(0).startswith("stand-in"):
        pytest.skip("needs kernels that run")
