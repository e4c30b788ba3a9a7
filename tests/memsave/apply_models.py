"""Small networks in the ways people write them, and how they compare before and after a change."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.memsave.kept_bytes import saved_bytes

__all__ = [
    "IN_PLACE_ATOL",
    "Choosing",
    "ResNet",
    "ResidualBlock",
    "Sequence",
    "compare",
    "kept_bytes",
    "sequence",
]

# Norms in place: the scale is |weight| + 1e-5 and xhat is read off the result. Values of about 1
# to 10 in float32 through about 20 layers: 1e-5 each, a few of which add up.
IN_PLACE_ATOL = 3e-4


class Sequence(nn.Sequential):
    """Layers in order."""


def sequence(norm: nn.Module, activation: nn.Module, channels: int = 4) -> Sequence:
    """Convolution, norm, activation, convolution, on 3 channels in 2 dimensions."""
    return Sequence(
        nn.Conv2d(3, channels, 3, padding=1), norm, activation, nn.Conv2d(channels, 2, 1)
    )


class ResidualBlock(nn.Module):
    """As in torchvision's ResNet, with the activation as a function."""

    def __init__(self, i: int, o: int, stride: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.downsample = (
            nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
            if stride > 1
            else None
        )
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's result."""
        y = self.function(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = y + (x if self.downsample is None else self.downsample(x))
        return self.function(y)


class ResNet(nn.Module):
    """Two blocks, features averaged, four classes."""

    def __init__(self, function: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(
            ResidualBlock(8, 8, 1, function), ResidualBlock(8, 16, 2, function)
        )
        self.head = nn.Linear(16, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.function(self.bn(self.conv(x)))
        logits: Tensor = self.head(self.layers(x).mean((2, 3)))
        return logits


class Choosing(nn.Module):
    """Its forward decides by the values of its input, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequence(nn.BatchNorm2d(4), nn.LeakyReLU(0.01))
        self.loose_norm = nn.BatchNorm2d(2)
        self.loose_activation = nn.LeakyReLU(0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return the body's result, activated where the input is bright."""
        y: Tensor = self.body(x)
        if x.mean() > 0:
            y = self.loose_activation(self.loose_norm(y))
        return y


def compare(
    changed: nn.Module, plain: nn.Module, x: Tensor, *, atol: float, gradient_share: float
) -> None:
    """Assert equal results in training and evaluation, and equal gradients and statistics.

    A gradient may be off by ``gradient_share`` of the largest in its tensor, plus as much of 1e-3
    for gradients that are 0 but for rounding (of a bias before a norm).
    """
    for training in (True, False, True):
        changed.train(training)
        plain.train(training)
        results = [_results(model(x.clone())) for model in (changed, plain)]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    for result in results:
        torch.autograd.backward(torch.stack([y.square().mean() for y in result]).sum())
    for ours_p, theirs_p in zip(_parameters_like(changed, plain), plain.parameters(), strict=True):
        if theirs_p.grad is None:
            assert ours_p.grad is None
            continue
        assert ours_p.grad is not None
        bound = gradient_share * (float(theirs_p.grad.abs().max()) + 1e-3)
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, rtol=0, atol=bound)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(changed.state_dict()[key], value, rtol=0, atol=atol)


def _parameters_like(changed: nn.Module, plain: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of ``changed`` in the order of ``plain``'s, by state-dict key."""
    found = changed.state_dict(keep_vars=True)
    return [found[name] for name, _ in plain.named_parameters()]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps of one forward in training, weights and input left out."""
    model.train()
    return saved_bytes(lambda: _results(model(x))[0], model) - x.nbytes


def _results(result: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
