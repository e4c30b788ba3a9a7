"""The floating-point operations of a prediction, counted without computing anything."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from memsave import networks

__all__ = ["count_flops"]


def count_flops(network: str, shape: tuple[int, ...]) -> int:
    """Return the FLOPs (2 x multiply-adds) of one sample's forward pass at ``shape``.

    torch's counter on tensors without data: convolutions and matrix products count, nothing else.
    """
    spec = networks.find_network(network)
    with torch.device("meta"), torch.no_grad():
        model = networks.build(network, {}).eval()
        images = torch.empty(1, spec.in_channels, *shape)
        with FlopCounterMode(display=False) as counter:
            model(images)
    return int(counter.get_total_flops())
