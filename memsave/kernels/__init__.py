"""Triton kernels of the in-place norms, for CUDA; the plain PyTorch maths stays their reference.

``tiles`` needs torch alone; the others import Triton, so they are imported where they run.
"""

__all__: list[str] = []
