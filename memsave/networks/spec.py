"""What the table of networks says of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["NetworkSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """A network as a suite file names it.

    ``factory`` takes the options as keywords and gives logits at the input's sides;
    ``divisor(options)`` says, building nothing, what each side must be a multiple of.
    """

    name: str
    factory: Callable[..., nn.Module]
    spatial_dims: int
    divisor: Callable[[Mapping[str, Any]], tuple[int, ...]]
    in_channels: int  # unless an option says otherwise
    classes: int  # unless an option says otherwise
    summary: str
    source: str
