"""The FCN with its finest levels run slab by slab: ``TiledFCN``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from memsave.errors import InputError, OptionError, RefusedError, UnknownNameError
from memsave.networks.fcn import FCN
from memsave.tiled.convolutions import as_parameter, check_layers
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

    slabs: int = 8  # along the last axis of the finest level; each level below has half as many
    levels: int = 1  # how many levels are tiled, the finest first
    keep: tuple[Keep, ...] = ("conv1", "conv2", "gradient", "skip_gradient")  # not made again
    keep_below: tuple[Keep, ...] | None = None  # on the levels below the finest; None: the same

    def __post_init__(self) -> None:
        if self.slabs < 1:
            raise OptionError(f"slabs must be 1 or more, got {self.slabs}")
        if self.levels < 1:
            raise OptionError(f"levels must be 1 or more, got {self.levels}")
        _check_keep("keep", self.keep)
        _check_keep("keep_below", self.keep_below or ())

    def keep_on(self, level: int) -> frozenset[Keep]:
        """Return what level ``level`` keeps, 0 being the finest."""
        below = level > 0 and self.keep_below is not None
        return frozenset((self.keep_below if below else self.keep) or ())


def _check_keep(option: str, keep: tuple[Keep, ...]) -> None:
    for name in keep:
        if name not in get_args(Keep):
            raise UnknownNameError("part to keep", name, get_args(Keep))
    if "conv1_forward" in keep and "gradient" not in keep:
        raise OptionError(
            "conv1_forward gives its place to the gradient in backward: keep gradient too, "
            f"or conv1; got {option}: {list(keep)}"
        )


class TiledFCN(FCN):
    """An ``FCN`` that shares another's modules, its finest levels run slab by slab.

    Made by ``tile_levels``. State dict, parameters and ``checkpointable_blocks`` of the levels
    below are those of the network given. In training use ``training_loss``: there head and loss
    are slab by slab as well. Called as a module it gives whole logits, which carry gradients too.
    """

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
        head = Pointwise(self.head, _compute_dtype(image, self.head.weight))
        return self._run(image, ConvolutionTail(head))

    def training_loss(self, image: Tensor, target: Tensor, loss: str) -> Tensor:
        """Return the loss called ``loss``, computed slab by slab: no logits live whole."""
        if loss not in SUMMED_LOSSES:
            raise UnknownNameError("loss summed over slabs", loss, SUMMED_LOSSES)
        check_target(target, image)
        head = Pointwise(self.head, _compute_dtype(image, self.head.weight))
        return self._run(image, LossTail(head, SUMMED_LOSSES[loss], target))

    def _run(self, image: Tensor, tail: Tail) -> Tensor:
        self._check(image)
        dtype, training = _compute_dtype(image, self.head.weight), torch.is_grad_enabled()
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
            if number == self.tiling.levels - 1:  # below it, the features are whole
                features = nn.functional.conv_transpose3d(features, up.weight)
            end = tail if number == 0 else self._up_tail(number, dtype)
            features = run_decoder(
                levels[number], features, as_parameter(up.bias), end, self._tail_parameters(number)
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
            return [as_parameter(self.upsampling[-number].weight)]
        return [as_parameter(p) for p in (self.head.weight, self.head.bias) if p is not None]

    def _layers(self, number: int, slices: int) -> LevelLayers:
        up = self.upsampling[-1 - number]
        return LevelLayers(
            encoder=self.encoder[number],
            up_bias=as_parameter(up.bias),
            decoder=self.decoder[-1 - number],
            slabs=cut(slices, max(1, self.tiling.slabs >> number)),  # as thick on every level
            keep=self.tiling.keep_on(number),
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

    A tiled level is cut along the last axis. Convolutions read the neighbouring slabs' slices and
    zeros at the volume's true ends; a norm's statistics, and in backward its two means, come from
    a pass over all slabs before they are used. All that is not stored is made again.

    Shapes: ``(N, in_channels, A, B, slices)``, as ``FCN``. ``slices`` are cut into ``slabs`` of
        about equal thickness, each level below into half as many.
    Memory: V voxels a tiled level, m and o the channels of its decoder's convolutions, i those of
        its input, b bytes a value (2 under autocast). From forward to backward: ``conv1`` m V b
        and ``conv2`` o V b bytes, if kept; ``skip``, the encoder's last convolution, o V b; the
        pooled features o V b / 8; the features that come back up o V b / 8; and 36 bytes a channel,
        norm and sample. In backward: ``gradient``, conv1's, m V b, taking the place of conv2
        and, with ``conv1_forward``, of conv1 slab by slab; ``skip_gradient``, o V b, taking the
        place of ``gradient``; it lives until the encoder's own backward. So all four of the
        defaults have their peak at (m + o) V b, ``conv1_forward`` and ``gradient`` at m V b. On
        top come a few slabs with their halos. A slab lies in blocks of the thickest one's bytes.
    Time: of six convolution passes over the decoder's level (two convolutions, each forward and
        two gradients), the defaults run none twice. Of them, leaving out ``gradient`` adds one
        pass, ``conv1``, ``conv2`` or ``skip_gradient`` three; with ``conv1_forward`` and
        ``gradient`` alone 7 are added, with ``gradient`` alone 11, with nothing kept 22. The
        encoder's convolutions, of a CCBlock 1 % of the level, run several times.
    Exact: gradients, loss and running statistics are the untiled network's but for the order in
        which sums over voxels are taken: nothing is approximated. In float64 they agree within
        1e-12. With half activations every value is rounded where the untiled network rounds it,
        the sum of upsampled features and skip once more; weight gradients are added over slabs in
        float32, norm sums and the loss's in float64. In-place norms compute their function, with
        ``|weight| + eps``, from the stored input: no inversion, so without its error. Running
        statistics are updated once a step.
    Errors: RefusedError for a network other than ``FCN``, and for layers that cannot be cut
        (SyncBatchNorm, strided convolutions); OptionError for levels or slabs that it does not
        have; InputError for a target or image that does not fit; BackwardError for a second
        backward of one forward.

    Source: recomputation after Chen et al., arXiv:1604.06174; merged variances, Chan, Golub,
    LeVeque 1983; a norm's two passes as in synchronised batch norm, slabs in place of processes.
    """
    if not isinstance(model, FCN):
        raise RefusedError(
            f"{type(model).__name__} cannot be tiled: only the levels of an FCN can be, since "
            "what runs slab by slab must be known from its layers"
        )
    return TiledFCN(model, options or TiledLevelsOptions())


def _compute_dtype(image: Tensor, weight: Tensor) -> torch.dtype:
    kind = image.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if image.dtype != weight.dtype:
        raise InputError(
            f"the network's weights are {weight.dtype}, the image is {image.dtype}: convert one of "
            "them, or run under autocast"
        )
    return image.dtype
