"""Losses that are functions of sums over voxels, so that they can be summed slab by slab.

The names and the values are those of ``membench``'s losses for class targets: logits (N, classes,
*sides) and int64 class indices (N, *sides). A slab gives a vector of sums; the vectors of all slabs
are added, and ``finish`` makes the loss of them. Its gradient by the sums, a few numbers, is
all that a slab needs to know of the others in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SUMMED_LOSSES", "SummedLoss"]

_IGNORED = -100  # F.cross_entropy's ignore_index
_SMOOTH = 1e-5


@dataclass(frozen=True, slots=True)
class SummedLoss:
    """``finish(sum over slabs of sums(logits, target))``: a scalar."""

    sums: Callable[[Tensor, Tensor], Tensor]  # (N, C, *), (N, *) -> (k,)
    finish: Callable[[Tensor], Tensor]  # (k,) -> ()


def _cross_entropy_sums(logits: Tensor, target: Tensor) -> Tensor:
    total = F.cross_entropy(logits, target, reduction="sum", ignore_index=_IGNORED)
    return torch.stack([total, (target != _IGNORED).sum().to(total.dtype)])


def _mean(sums: Tensor) -> Tensor:
    return sums[0] / sums[1]


def _dice_sums(logits: Tensor, target: Tensor) -> Tensor:
    """Return, a row each: sum(p g), sum(p), sum(g) by class."""
    p = logits.softmax(dim=1)
    g = _one_hot(target, logits.shape[1])
    voxels = [0, *range(2, logits.dim())]
    rows = [torch.where(g, p, 0).sum(voxels), p.sum(voxels), g.sum(voxels).to(p.dtype)]
    return torch.cat(rows)


def _dice(sums: Tensor) -> Tensor:
    overlap, p, g = sums.view(3, -1)[:, 1:]
    dice: Tensor = ((2 * overlap + _SMOOTH) / (p + g + _SMOOTH)).mean()
    return 1 - dice


def _cross_entropy_and_dice_sums(logits: Tensor, target: Tensor) -> Tensor:
    return torch.cat([_cross_entropy_sums(logits, target), _dice_sums(logits, target)])


def _cross_entropy_and_dice(sums: Tensor) -> Tensor:
    return _mean(sums[:2]) + _dice(sums[2:])


def _focal_sums(logits: Tensor, target: Tensor) -> Tensor:
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    total = ((1 - torch.exp(-cross_entropy)) ** 2.0 * cross_entropy).sum()
    return torch.stack([total, torch.full_like(total, cross_entropy.numel())])


def _l2_dice_sums(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.softmax(dim=1)[:, 1:]
    g = _one_hot(target, logits.shape[1])[:, 1:]
    return torch.stack([torch.where(g, p, 0).sum(), (p * p).sum(), g.sum().to(p.dtype)])


def _l2_dice(sums: Tensor) -> Tensor:
    return 1 - 2 * sums[0] / (sums[1] + sums[2] + _SMOOTH)


def _one_hot(target: Tensor, classes: int) -> Tensor:
    indices = torch.arange(classes, device=target.device)
    one_hot: Tensor = target.unsqueeze(1) == indices.view(-1, *(1,) * (target.dim() - 1))
    return one_hot


# name in a suite file -> the loss, as a function of sums
SUMMED_LOSSES: dict[str, SummedLoss] = {
    "cross_entropy": SummedLoss(_cross_entropy_sums, _mean),
    "dice": SummedLoss(_dice_sums, _dice),
    "cross_entropy+dice": SummedLoss(_cross_entropy_and_dice_sums, _cross_entropy_and_dice),
    "focal": SummedLoss(_focal_sums, _mean),
    "l2_dice": SummedLoss(_l2_dice_sums, _l2_dice),
}
