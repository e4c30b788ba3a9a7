"""In-place norms by their formulas, in float64, out of place: what all else is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["plain_norm"]


def plain_norm(
    x: Tensor,
    groups: int | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> Tensor:
    """``act((|weight| + eps) * xhat + bias)`` of x (N, C, *), in float64, differentiable.

    ``groups`` of channels of each sample share statistics; None: a channel of the whole batch.
    """
    x = x.double()
    if groups is None:
        rows = x.transpose(0, 1).reshape(x.shape[1], -1)
        xhat = _standardised(rows, eps).reshape(x.transpose(0, 1).shape).transpose(0, 1)
    else:
        xhat = _standardised(x.reshape(x.shape[0] * groups, -1), eps).reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    y = xhat
    if weight is not None:
        y = y * (weight.double().abs() + eps).view(per_channel)
    if bias is not None:
        y = y + bias.double().view(per_channel)
    if activation == "leaky_relu":
        return F.leaky_relu(y, param)
    return F.elu(y, param) if activation == "elu" else y


def _standardised(rows: Tensor, eps: float) -> Tensor:
    var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    return (rows - mean) * torch.rsqrt(var + eps)
