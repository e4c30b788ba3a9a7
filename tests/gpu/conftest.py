"""Everything in this folder needs a GPU, and is skipped, visibly, without one.

On a stand-in GPU (``tests/stand_in``) all runs but what is marked ``needs_kernels``, of which
``tests/conftest.py`` takes care.
"""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")  # before a module's own fixtures
def _gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    # Even when it is empty, torch reads the old name first and then not PYTORCH_ALLOC_CONF.
    os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
