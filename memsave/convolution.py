"""The convolution that every block is made of."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from memsave.errors import OptionError

__all__ = ["convolution"]

_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def convolution(
    in_channels: int, out_channels: int, kernel: int, *, groups: int = 1, spatial_dims: int = 3
) -> nn.Module:
    """Return a convolution without bias that keeps its input's sides (odd ``kernel``)."""
    if spatial_dims not in _CONVOLUTIONS:
        raise OptionError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims!r}")
    return _CONVOLUTIONS[spatial_dims](
        in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False
    )
