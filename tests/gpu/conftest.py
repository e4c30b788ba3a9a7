"""Everything in this folder needs a GPU, and is skipped, visibly, without one."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")  # before a module's own fixtures
def _gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
