"""Networks, losses and optimizers that stand for a user's own; nothing of memsave is in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ByKeyword",
    "Classifier",
    "Detached",
    "Flexible",
    "Half",
    "Lazy",
    "ReadsInConstructor",
    "ReadsInForward",
    "Recurrent",
    "SharedList",
    "Tied",
    "TwoInputs",
    "TwoOutputs",
    "doubled_cross_entropy",
    "failing",
    "huge",
    "make_adamw",
    "no_module",
    "output_norm",
    "three_arguments",
]


class Flexible(nn.Module):
    """A convolution to ``width`` channels and one to ``classes``; its output is like its input."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, width, kernel_size=3, padding=1)
        self.last = nn.Conv3d(width, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x))
        return result


class Half(Flexible):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., ::2]


class Classifier(Flexible):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(dim=(2, 3, 4))


class Detached(Flexible):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class TwoOutputs(Flexible):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        result = super().forward(x)
        return {"logits": result, "mean": result.mean(dim=(2, 3, 4))}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 5)
        self.scale = nn.Linear(5, 5)

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = self.scale(self.words(tokens)) * weights
        return result


class Tied(nn.Module):
    """Two layers that share one weight, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.offset = torch.zeros(16)
        self.offsets = [torch.zeros(16)]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x) + self.offset) + self.offsets[0]
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.cell(x)[0]
        return result


class ReadsInConstructor(Flexible):
    def __init__(self) -> None:
        rates = [rate.item() for rate in torch.linspace(1, 4, 2)]
        super().__init__(width=int(rates[-1]))
        self.rates = torch.tensor(rates)  # a plain attribute, as a drop path's


class ReadsInForward(Flexible):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean().item() > 0:  # this line is named
            x = x + 1
        return super().forward(x)


def doubled_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return 2 * nn.functional.cross_entropy(output, target)


def output_norm(output: Tensor) -> Tensor:
    result: Tensor = (output * output).sum()
    return result


def make_adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters)


def huge() -> nn.Module:
    """100,014,060 parameters: 10 x (3162^2 weights + 3162 biases)."""
    return nn.Sequential(*[nn.Linear(3162, 3162) for _ in range(10)])


def no_module() -> int:
    return 3


def failing() -> nn.Module:
    raise ValueError("the width must be even")


class ByKeyword(Flexible):
    def forward(self, *, image: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(image)


class SharedList(Flexible):
    """Two of its parts hold one list, into which the one puts what the other takes out."""

    def __init__(self) -> None:
        super().__init__()
        kept = [torch.zeros(1)]
        writer: Any = nn.Identity()
        reader: Any = nn.Identity()
        writer.kept, reader.kept = kept, kept
        self.writer, self.reader = writer, reader

    def forward(self, x: Tensor) -> Tensor:
        self.writer.kept[0] = self.first(x)
        result: Tensor = self.last(self.reader.kept[0])
        return result


def made_on_meta() -> Flexible:
    with torch.device("meta"):
        return Flexible()


class WorksOutATable(Flexible):
    """Its constructor needs 1 MiB for a moment, where the network is made."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(512, 512).sum(0)[:1])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) * self.scale
        return result


class Lazy(Flexible):
    def __init__(self) -> None:
        super().__init__()
        self.later = nn.LazyLinear(3)


def three_arguments(output: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    return nn.functional.gaussian_nll_loss(output, target, variance)
