"""The losses that suites name, as the papers train with them.

Shapes: ``logits`` (batch, classes, *spatial), ``target`` (batch, *spatial) int64 class indices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "cross_entropy_and_dice", "soft_dice"]


def soft_dice(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """One minus the mean soft Dice coefficient of the foreground classes; a scalar.

    Dice of class c is ``(2 sum(p g) + smooth) / (sum(p) + sum(g) + smooth)`` over the batch and
    all voxels, with p the softmax of the logits and g the one-hot target.
    """
    probabilities = logits.softmax(dim=1)
    one_hot = torch.zeros(probabilities.shape, dtype=torch.bool, device=target.device)
    one_hot.scatter_(1, target.unsqueeze(1), True)
    voxels = [0, *range(2, logits.dim())]
    overlap = (probabilities * one_hot).sum(dim=voxels)[1:]
    total = (probabilities.sum(dim=voxels) + one_hot.sum(dim=voxels))[1:]
    return 1 - ((2 * overlap + smooth) / (total + smooth)).mean()


def cross_entropy_and_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice, the FCN paper's loss (after Isensee et al., KiTS19)."""
    return F.cross_entropy(logits, target) + soft_dice(logits, target)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "dice": soft_dice,
    "cross_entropy+dice": cross_entropy_and_dice,
}
