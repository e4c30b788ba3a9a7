"""Does a network's gradient point where its loss says it does?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

__all__ = ["assert_gradient_is_the_slope"]

STEP = 1e-9


def assert_gradient_is_the_slope(
    model: nn.Module, image: Tensor, loss: Callable[[Tensor], Tensor]
) -> None:
    """Every parameter has a gradient, and a small step along all lowers the loss by its length.

    In float64, so that a step of 1e-9 |gradient| shows and crosses hardly a kink of a ReLU or a
    pooling: 1 % is for those. Each forward draws the same dropout.
    """
    model.double()

    def value() -> Tensor:
        torch.manual_seed(7)
        return loss(model(image.double()))

    before = value()
    torch.autograd.backward(before)
    steepness = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            steepness += parameter.grad.square().sum().item()
            parameter.sub_(parameter.grad, alpha=STEP)
        lowered = (before - value()).item()
    assert steepness > 0
    assert lowered == pytest.approx(STEP * steepness, rel=0.01)
