"""The FCN with its finest levels run slab by slab: ``TiledFCN``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from memsave.errors import OptionError, RefusedError, UnknownNameError
from memsave.networks.fcn import FCN
from memsave.tiled.convolutions import check_layers
from memsave.tiled.functions import run_decoder, run_encoder
from memsave.tiled.level import Keep, Level, LevelLayers, Tail
from memsave.tiled.losses import SUMMED_LOSSES
from memsave.tiled.norm_rules import norm_rule
from memsave.tiled.slabs import cut
from memsave.tiled.stage import split_stages
from memsave.tiled.tails import ConvolutionTail, LossTail, Pointwise, check_target

__all__ = ["TiledFCN", "TiledLevelsOptions", "tile_levels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledLevelsOptions:
    """How levels are tiled."""

    slabs: int = 8  # slabs along the last axis, on every tiled level
    levels: int = 1  # how many levels, the finest first
    keep: tuple[Keep, ...] = ("conv1", "conv2", "gradient")  # what is stored, not made again

    def __post_init__(self) -> None:
        if self.slabs < 1:
            raise OptionError(f"slabs must be 1 or more, got {self.slabs}")
        if self.levels < 1:
            raise OptionError(f"levels must be 1 or more, got {self.levels}")
        for name in self.keep:
            if name not in get_args(Keep):
                raise UnknownNameError("part to keep", name, get_args(Keep))


class TiledFCN(FCN):
    """An ``FCN`` that shares another's modules, its finest levels run slab by slab."""

    def __init__(self, network: FCN, options: TiledLevelsOptions) -> None:
        nn.Module.__init__(self)
        self.in_channels, self.widths = network.in_channels, network.widths
        self.encoder, self.pool = network.encoder, network.pool
        self.upsampling, self.decoder = network.upsampling, network.decoder
        self.head = network.head
        self.tiling = options
        self._check_layers()
        self.train(network.training)

    @property
    def training_losses(self) -> tuple[str, ...]:
        """The losses that ``training_loss`` knows."""
        return tuple(SUMMED_LOSSES)

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that may be recomputed: those of the levels that are not tiled."""
        first, last = self.tiling.levels, len(self.decoder) - self.tiling.levels
        encoder = (f"encoder.{i}" for i in range(first, len(self.encoder)))
        return (*encoder, *(f"decoder.{i}" for i in range(last)))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of ``image``, whole."""
        head = Pointwise(self.head, _compute_dtype(image))
        return self._run(image, ConvolutionTail(head))

    def training_loss(self, image: Tensor, target: Tensor, loss: str) -> Tensor:
        """Return the loss called ``loss``, computed slab by slab: no logits live whole."""
        if loss not in SUMMED_LOSSES:
            raise UnknownNameError("loss summed over slabs", loss, SUMMED_LOSSES)
        check_target(target, image)
        head = Pointwise(self.head, _compute_dtype(image))
        return self._run(image, LossTail(head, SUMMED_LOSSES[loss], target))

    def _run(self, image: Tensor, tail: Tail) -> Tensor:
        self._check(image)
        dtype, training = _compute_dtype(image), torch.is_grad_enabled()
        levels: list[Level] = []
        features = image
        for number in range(self.tiling.levels):
            layers = self._layers(number, features.shape[-1])
            levels.append(Level(layers, features, dtype, training=training))
            features = run_encoder(levels[-1], features)
        features = self._untiled(features)
        for number in reversed(range(self.tiling.levels)):
            up = self.upsampling[-1 - number]
            assert isinstance(up, nn.ConvTranspose3d)
            assert up.bias is not None
            if number == self.tiling.levels - 1:  # below it, the features are whole
                features = nn.functional.conv_transpose3d(features, up.weight)
            end = tail if number == 0 else self._up_tail(number, dtype)
            features = run_decoder(
                levels[number], features, up.bias, end, self._tail_parameters(number)
            )
        return features

    def _untiled(self, features: Tensor) -> Tensor:
        """Run the levels below, as ``FCN.forward`` does."""
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder[self.tiling.levels :]):
            if level > 0:
                skips.append(features)
                features = self.pool(features)
            features = block(features)
        for upsampling, block in zip(self.upsampling, self.decoder, strict=True):
            if not skips:
                break
            features = upsampling(features)
            features += skips.pop()
            features = block(features)
        return features

    def _up_tail(self, number: int, dtype: torch.dtype) -> Tail:
        up = self.upsampling[-number]
        assert isinstance(up, nn.ConvTranspose3d)
        return ConvolutionTail(Pointwise(up, dtype))

    def _tail_parameters(self, number: int) -> list[nn.Parameter]:
        if number > 0:
            return [self.upsampling[-number].weight]  # type: ignore[list-item]
        return [p for p in (self.head.weight, self.head.bias) if p is not None]

    def _layers(self, number: int, slices: int) -> LevelLayers:
        up = self.upsampling[-1 - number]
        assert isinstance(up.bias, nn.Parameter)
        return LevelLayers(
            encoder=self.encoder[number],
            up_bias=up.bias,
            decoder=self.decoder[-1 - number],
            slabs=cut(slices, min(self.tiling.slabs, slices // 2)),
            keep=frozenset(self.tiling.keep),
        )

    def _check_layers(self) -> None:
        levels = len(self.encoder) - 1
        if self.tiling.levels > levels:
            raise OptionError(
                f"this FCN has {levels} levels that can be tiled, all but the coarsest, "
                f"got levels: {self.tiling.levels}"
            )
        for number in range(self.tiling.levels):
            for block in (self.encoder[number], self.decoder[-1 - number]):
                for convolutions, norm in split_stages(block):
                    check_layers(convolutions)
                    norm_rule(norm)


def tile_levels(model: nn.Module, options: TiledLevelsOptions | None = None) -> TiledFCN:
    """Return the network with its finest levels run slab by slab; it shares its parameters.

    Raises RefusedError for a network other than ``FCN``.
    """
    if not isinstance(model, FCN):
        raise RefusedError(
            f"{type(model).__name__} cannot be tiled: the levels of an FCN alone can be, since what "
            "runs slab by slab must be known from its layers"
        )
    return TiledFCN(model, options or TiledLevelsOptions())


def _compute_dtype(image: Tensor) -> torch.dtype:
    kind = image.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return image.dtype
