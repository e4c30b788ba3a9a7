"""Without a GPU, Triton's kernels run under its interpreter, which must be asked for in advance."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is first imported
