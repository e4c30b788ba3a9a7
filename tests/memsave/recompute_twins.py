"""Two networks of one seed, plain and recomputed, that differ in who reads the pair's result."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from memsave.recompute_pairs import recompute_pairs
from memsave.recomputed_norm_act import recompute

__all__ = [
    "ACTIVATION_BYTES",
    "STATISTICS_BYTES",
    "C",
    "H",
    "N",
    "Read",
    "Readers",
    "W",
    "WideGroupNorm",
    "assert_same_bits",
    "gradients",
    "recomputed_sequence",
    "twins",
]

N, C, H, W = 2, 4, 6, 6
ACTIVATION_BYTES = N * C * H * W * 4
STATISTICS_BYTES = 2 * C * 4

Read = Callable[["Readers", Tensor], Tensor]  # z to something


class WideGroupNorm(nn.GroupNorm):
    """Group norm in float32, as autocast runs it on CUDA, and not on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class Readers(nn.Module):
    """Convolution, pair, and then ``read``, which has two convolutions to use."""

    def __init__(self, read: Read, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(C, C, 3, padding=1)
        self.pair = nn.Sequential(norm or nn.BatchNorm2d(C), nn.ReLU(inplace=True))
        self.a, self.b = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        self.linear = nn.Linear(C * H * W, 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.read(self, self.pair(self.first(x)))
        return result


def gradients(model: nn.Module, scope: bool, inside: bool = False) -> list[Tensor]:
    """Result and gradients; ``inside``: backward runs in the scope."""
    torch.manual_seed(1)
    x = torch.randn(N, C, H, W, requires_grad=True)
    if not scope:
        result = model(x)
        torch.autograd.backward(result.double().square().sum())
    else:
        with recompute(model):
            result = model(x)
            if inside:
                torch.autograd.backward(result.double().square().sum())
        if not inside:
            torch.autograd.backward(result.double().square().sum())
    made = [x.grad, *(p.grad for p in model.parameters())]
    return [result.detach(), *(g for g in made if g is not None), *model.buffers()]


def twins(read: Read, norm: nn.Module | None = None) -> tuple[Readers, Readers]:
    plain = Readers(read, copy.deepcopy(norm))
    mine = copy.deepcopy(plain)
    assert recompute_pairs(mine) == 1
    return plain, mine


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def recomputed_sequence() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3))
    assert recompute_pairs(model) == 1
    return model
