"""The literal table of networks: the name in a suite file -> how to build it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from memsave.errors import UnknownNameError
from memsave.networks.fcn import FCN, fcn_divisor
from memsave.networks.spec import NetworkSpec

__all__ = ["FCN", "NETWORKS", "NetworkSpec", "build", "check_options", "find_network"]

NETWORKS: dict[str, NetworkSpec] = {
    "fcn": NetworkSpec(
        name="fcn",
        factory=FCN,
        spatial_dims=3,
        divisor=fcn_divisor,
        in_channels=1,
        classes=3,
        summary="3D U-Net with summed skips; compact blocks and in-place ABN by option",
        source="Wang, Oda, Mori: Organ Segmentation From Full-size CT Images Using "
        "Memory-Efficient FCN",
    ),
}


def find_network(name: str) -> NetworkSpec:
    """Return the network called ``name``, or raise UnknownNameError with near names."""
    if name not in NETWORKS:
        raise UnknownNameError("network", name, NETWORKS)
    return NETWORKS[name]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise UnknownNameError if network ``name`` has no option that ``options`` names."""
    known = inspect.signature(find_network(name).factory).parameters
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of network {name!r}", option, known)


def build(name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the network called ``name``, with the options that a suite gives it.

    Raises UnknownNameError or OptionError, naming the network or option and what is wrong.
    """
    check_options(name, options or {})
    return find_network(name).factory(**(options or {}))
