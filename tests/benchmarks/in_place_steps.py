"""Forward and backward of a layer alone, on inputs made beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["forward_and_backward", "pair"]


class _Source(torch.autograd.Function):
    # Gives x as the output of an operation that keeps nothing, and takes its gradient for free.
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        return None, dx.new_zeros(())


def forward_and_backward(
    layer: Callable[[Tensor], Tensor], x: Tensor, dz: Tensor
) -> Callable[[], Callable[[], object]]:
    """Return what makes an input, and then runs ``layer`` on it, both ways."""
    seed = torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)

    def prepare() -> Callable[[], object]:
        inputs: list[Tensor] = [_Source.apply(x, seed)]  # type: ignore[no-untyped-call]

        def run() -> object:
            torch.autograd.backward(layer(inputs.pop()), dz)
            return None

        return run

    return prepare


def pair(norm: nn.Module) -> nn.Sequential:
    """Return ``norm`` and the activation in place, as people write them."""
    return nn.Sequential(norm, nn.LeakyReLU(0.01, inplace=True))
