"""The losses that suites name, as the papers train with them.

A network says what it is trained towards (``memsave.networks.NetworkSpec.target``):

- ``"classes"``: ``output`` are logits (batch, classes, *sides), ``target`` int64 class indices
  (batch, *sides);
- ``"mask"``: ``output`` are probabilities and ``target`` floating-point 0 and 1, both (batch,
  channels, *sides).

All run under autocast and compute in float32 at least; the two with soft Dice leave that to CUDA's
autocast, which takes softmax and sums in float32 (the CPU's does not). ``check_loss`` says which
loss takes which target.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.errors import MembenchError, nearest
from memsave.networks import Target

__all__ = [
    "LOSSES",
    "LOSS_TARGETS",
    "binary_cross_entropy",
    "check_loss",
    "cross_entropy_and_dice",
    "focal",
    "l2_dice",
    "soft_dice",
]


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


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean over voxels of ``-(1 - p)^gamma log p``, p the softmax of the target's class; a scalar.

    With gamma 0 it is cross-entropy; the more sure a voxel, the less it weighs.
    Source: Lin et al., "Focal Loss for Dense Object Detection", arXiv:1708.02002, with no class
    weights. FLARE21's entry says no more than "focal loss"; gamma 2 is its source's and our choice.
    """
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    return ((1 - torch.exp(-cross_entropy)) ** gamma * cross_entropy).mean()


def binary_cross_entropy(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean of ``-(g log p + (1 - g) log(1 - p))``, each log being -100 at least; a scalar.

    torch refuses it under autocast, since half precision has no p near 1: it is computed outside
    of autocast here, in float32. That cures the loss alone; the network must compute its
    probabilities in float32 too, as ``conv_lstm`` does with its state. A probability that is not
    in 0 to 1, such as NaN, is torch's own error, on CUDA one that ends the process.
    """
    with torch.autocast(probabilities.device.type, enabled=False):
        p = _float32_at_least(probabilities)
        # Reduced by hand: torch's own mean keeps room for every voxel behind its one number, and
        # so holds a volume until the step ends.
        each = F.binary_cross_entropy(p, target.to(p.dtype), reduction="none")
        return each.sum() / each.numel()


def l2_dice(output: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """One minus ``2 sum(p g) / (sum(p^2) + sum(g^2) + smooth)`` over the foreground; a scalar.

    Takes either target. Of class indices the foreground is every class but 0, p their softmax; of
    a mask it is all of it. The sums run over batch, channels and voxels together.
    Source: the L2 relaxation of Dice that PocketNet trains with, arXiv:2104.10745.
    """
    p, g = _foreground(output, target)
    return 1 - 2 * (p * g).sum() / ((p * p).sum() + g.sum() + smooth)  # g is 0 or 1: g^2 = g


def _foreground(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities and target of the foreground, of one shape."""
    if target.is_floating_point():
        p = _float32_at_least(output)
        return p, target.to(p.dtype)
    p = _float32_at_least(output).softmax(dim=1)[:, 1:]
    classes = torch.arange(1, output.shape[1], device=target.device)
    g = target.unsqueeze(1) == classes.view(-1, *(1,) * (target.dim() - 1))
    return p, g


def _float32_at_least(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "dice": soft_dice,
    "cross_entropy+dice": cross_entropy_and_dice,
    "focal": focal,
    "binary_cross_entropy": binary_cross_entropy,
    "l2_dice": l2_dice,
}

LOSS_TARGETS: dict[str, tuple[Target, ...]] = {
    "cross_entropy": ("classes",),
    "dice": ("classes",),
    "cross_entropy+dice": ("classes",),
    "focal": ("classes",),
    "binary_cross_entropy": ("mask",),
    "l2_dice": ("classes", "mask"),
}


def check_loss(name: str, target: Target) -> None:
    """Raise MembenchError unless there is a loss ``name`` and it takes targets of this kind."""
    if name not in LOSSES:
        raise MembenchError(f"unknown loss {name!r}{nearest(name, LOSSES)}")
    if target not in LOSS_TARGETS[name]:
        usable = [loss for loss, targets in LOSS_TARGETS.items() if target in targets]
        raise MembenchError(
            f"loss {name!r} takes {' or '.join(LOSS_TARGETS[name])}, the network is trained "
            f"towards {'a mask' if target == 'mask' else 'classes'}: use {' or '.join(usable)}"
        )
