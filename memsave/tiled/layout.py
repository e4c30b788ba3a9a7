"""How a U-Net says what its levels are made of, so that they can run slab by slab.

A network of your own declares it in one method, by its modules' names::

    class MyUNet(nn.Module):
        def unet_layout(self) -> memsave.UNetLayout:
            levels = [
                memsave.UNetLevel(
                    encoder=f"down.{i}", pool=f"pools.{i}", up=f"ups.{i}", decoder=f"back.{i}"
                )
                for i in range(4)
            ]
            return memsave.UNetLayout(
                levels=tuple(levels), bottom="bottom", head="head", join="skip_first"
            )

It promises that the forward is this and nothing else, finest level first: encoder, pool; at last
bottom; and back up: up, join with the encoder's result, decoder; at last head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, get_args, runtime_checkable

from torch import nn

from memsave.errors import OptionError, RefusedError
from memsave.networks.fcn import FCN
from memsave.networks.light_unet import LightUNet
from memsave.networks.pocket import PocketNet3D
from memsave.tiled.joins import JoinOrder

__all__ = ["DeclaresLevels", "Kind", "UNetLayout", "UNetLevel", "find_layout", "find_module"]

Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetLevel:
    """One level of a U-Net but for the coarsest, by the dotted names of its modules."""

    encoder: str  # nn.Sequential of convolutions, norms and activations, or of such sequences
    pool: str  # nn.MaxPool3d, from the encoder's result to the level below
    up: str  # nn.ConvTranspose3d, from the level below, of the pooling's kernel and stride
    decoder: str  # as encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetLayout:
    """What a U-Net's forward does, in the names of its modules.

    ``join`` is ``"sum"``, or, where the two are concatenated, what comes first: ``"skip_first"``
    or ``"upsampled_first"``.
    """

    levels: tuple[UNetLevel, ...]  # finest first
    bottom: str  # the coarsest level: any module, since it is never tiled
    head: str  # nn.Conv3d of kernel 1, to the logits
    join: JoinOrder

    def __post_init__(self) -> None:
        if self.join not in get_args(JoinOrder):
            known = ", ".join(get_args(JoinOrder))
            raise OptionError(f"join must be one of {known}, got {self.join!r}")
        if not self.levels:
            raise OptionError("a UNetLayout needs one level or more above its bottom, got none")

    def untiled(self, tiled: int) -> tuple[str, ...]:
        """Return the blocks below the first ``tiled`` levels, in the order in which they run."""
        below = self.levels[tiled:]
        encoders, decoders = (level.encoder for level in below), (v.decoder for v in below[::-1])
        return (*encoders, self.bottom, *decoders)


@runtime_checkable
class DeclaresLevels(Protocol):
    """A U-Net that says what its levels are made of."""

    def unet_layout(self) -> UNetLayout:
        """Return the names of its modules."""
        ...


def find_layout(network: nn.Module) -> UNetLayout:
    """Return what ``network`` declares, or what is known of a network of its class.

    Known are ``FCN``, ``LightUNet`` and ``PocketNet3D``, and MONAI's ``BasicUNet`` by its modules.
    Raises RefusedError for any other.
    """
    if isinstance(network, DeclaresLevels):
        layout: object = network.unet_layout()
        if not isinstance(layout, UNetLayout):
            raise RefusedError(
                f"unet_layout() of {type(network).__name__} must return a memsave.UNetLayout, "
                f"got {type(layout).__name__}"
            )
        return layout
    for kind, make in _KNOWN.items():
        if isinstance(network, kind):
            return make(network)
    if _is_basic_unet(network):
        return _BASIC_UNET
    raise RefusedError(
        f"{type(network).__name__} cannot be tiled: what its levels are made of is not known. Give "
        "its class a method unet_layout() that returns a memsave.UNetLayout, the names of each "
        "level's encoder, pool, up and decoder, of bottom and head, and how skips are joined"
    )


def find_module(network: nn.Module, name: str, kind: type[Kind], owner: str) -> Kind:
    """Return the module called ``name``, or raise RefusedError where it is none or another kind.

    ``owner`` is what the network is called in errors.
    """
    try:
        module = network.get_submodule(name)
    except AttributeError:
        raise RefusedError(f"{owner} has no module {name!r}, which its unet_layout names") from None
    if not isinstance(module, kind):
        raise RefusedError(
            f"{name} of {owner} is a {type(module).__name__}: a tiled U-Net needs "
            f"nn.{kind.__name__} there"
        )
    return module


def _encoder_lists(count: int, join: JoinOrder, pool: str = "pool") -> UNetLayout:
    """Return the layout of this package's U-Nets, whose ups and decoders run coarsest first."""
    levels = [
        UNetLevel(
            encoder=f"encoder.{i}",
            pool=pool,
            up=f"upsampling.{count - 1 - i}",
            decoder=f"decoder.{count - 1 - i}",
        )
        for i in range(count)
    ]
    return UNetLayout(levels=tuple(levels), bottom=f"encoder.{count}", head="head", join=join)


def _of_fcn(network: nn.Module) -> UNetLayout:
    return _encoder_lists(_poolings(network), "sum")


def _of_light_unet(network: nn.Module) -> UNetLayout:
    return _encoder_lists(_poolings(network), "skip_first")


def _of_pocketnet(network: nn.Module) -> UNetLayout:
    return _encoder_lists(_poolings(network), "upsampled_first")


def _poolings(network: nn.Module) -> int:
    return len(list(network.get_submodule("encoder").children())) - 1


_KNOWN: dict[type[nn.Module], Callable[[nn.Module], UNetLayout]] = {
    FCN: _of_fcn,
    LightUNet: _of_light_unet,
    PocketNet3D: _of_pocketnet,
}

_BASIC_UNET = UNetLayout(
    levels=tuple(
        UNetLevel(
            encoder="conv_0" if i == 0 else f"down_{i}.convs",
            pool=f"down_{i + 1}.max_pooling",
            up=f"upcat_{i + 1}.upsample.deconv",
            decoder=f"upcat_{i + 1}.convs",
        )
        for i in range(4)
    ),
    bottom="down_4.convs",
    head="final_conv",
    join="skip_first",
)


def _is_basic_unet(network: nn.Module) -> bool:
    kind = type(network)
    return kind.__name__ == "BasicUNet" and kind.__module__.startswith("monai.networks.nets")
