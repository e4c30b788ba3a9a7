"""A U-Net with its finest levels run slab by slab: ``TiledUNet``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from memsave.errors import InputError, OptionError, RefusedError, UnknownNameError
from memsave.tiled.convolutions import as_parameter
from memsave.tiled.functions import run_decoder, run_encoder
from memsave.tiled.joins import check_upsampling, is_pointwise, make_join
from memsave.tiled.layers import split_stages
from memsave.tiled.layout import Kind, UNetLevel, find_layout, find_module
from memsave.tiled.level import Keep, Level, LevelLayers, Tail
from memsave.tiled.losses import SUMMED_LOSSES
from memsave.tiled.slabs import cut
from memsave.tiled.tails import ConvolutionTail, LossTail, Pointwise, WholeTail, check_target

__all__ = ["TiledLevelsOptions", "TiledUNet", "tile_levels"]


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


class TiledUNet(nn.Module):
    """A U-Net that shares another's modules, its finest levels run slab by slab.

    Made by ``tile_levels``. State dict and parameters are those of the network given, with the
    same names; ``checkpointable_blocks`` are those of the levels below. In training use
    ``training_loss``: there head and loss are slab by slab as well. Called as a module it gives
    whole logits, which carry gradients too.
    """

    def __init__(self, network: nn.Module, options: TiledLevelsOptions) -> None:
        super().__init__()
        self.layout = find_layout(network)
        self.network_name = type(network).__name__
        if network._parameters or network._buffers:
            own = next(iter((*network._parameters, *network._buffers)))
            raise RefusedError(
                f"{self.network_name} cannot be tiled: it has {own!r} of its own, beside its "
                "modules, which a level's layers cannot read"
            )
        for name, module in network.named_children():
            self.add_module(name, module)
        self.tiling = options
        self._check_layers()
        self.train(network.training)

    @property
    def training_losses(self) -> tuple[str, ...]:
        """The losses that ``training_loss`` knows."""
        return tuple(SUMMED_LOSSES)

    @property
    def divisor(self) -> tuple[int, int, int]:
        """What each side of the input must be a multiple of."""
        product = [1, 1, 1]
        for level in self.layout.levels:
            product = [a * b for a, b in zip(product, self._pool_kernel(level), strict=True)]
        return (product[0], product[1], product[2])

    def checkpointable_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that may be recomputed: those of the levels that are not tiled."""
        return self.layout.untiled(self.tiling.levels)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of ``image``, whole."""
        head = Pointwise(self._head(), self._compute_dtype(image))
        return self._run(image, ConvolutionTail(head))

    def training_loss(self, image: Tensor, target: Tensor, loss: str) -> Tensor:
        """Return the loss called ``loss``, computed slab by slab: no logits live whole."""
        if loss not in SUMMED_LOSSES:
            raise UnknownNameError("loss summed over slabs", loss, SUMMED_LOSSES)
        check_target(target, image)
        head = Pointwise(self._head(), self._compute_dtype(image))
        return self._run(image, LossTail(head, SUMMED_LOSSES[loss], target))

    def _run(self, image: Tensor, tail: Tail) -> Tensor:
        self._check(image)
        dtype, training = self._compute_dtype(image), torch.is_grad_enabled()
        levels: list[Level] = []
        features = image
        for number, declared in enumerate(self.layout.levels[: self.tiling.levels]):
            layers = self._layers(number, features.shape[-1])
            join = make_join(self._up(declared), self.layout.join, layers.slabs, dtype)
            levels.append(Level(layers, join, features, dtype, training=training))
            features = run_encoder(levels[-1], features)
        features = self._untiled(features)
        for number in reversed(range(self.tiling.levels)):
            up = self._up(self.layout.levels[number])
            pointwise = is_pointwise(up, self.layout.join)
            if pointwise and number == self.tiling.levels - 1:  # below it, the features are whole
                features = nn.functional.conv_transpose3d(features, up.weight)
            end = tail if number == 0 else self._tail_of(number, dtype)
            features = run_decoder(levels[number], features, end, self._tail_parameters(number))
        return features

    def _untiled(self, features: Tensor) -> Tensor:
        """Run the levels below, as the network's own forward does."""
        below = self.layout.levels[self.tiling.levels :]
        skips: list[Tensor] = []
        for level in below:
            skips.append(self.get_submodule(level.encoder)(features))
            features = self.get_submodule(level.pool)(skips[-1])
        features = self.get_submodule(self.layout.bottom)(features)
        for level in below[::-1]:
            features = self.get_submodule(level.up)(features)
            if self.layout.join == "sum":
                features += skips.pop()  # the other way round: pooling kept the skip
            elif self.layout.join == "skip_first":
                features = torch.cat([skips.pop(), features], dim=1)
            else:
                features = torch.cat([features, skips.pop()], dim=1)
            features = self.get_submodule(level.decoder)(features)
        return features

    def _tail_of(self, number: int, dtype: torch.dtype) -> Tail:
        """Return what ends level ``number`` where a tiled level lies above it."""
        up = self._up(self.layout.levels[number - 1])
        if is_pointwise(up, self.layout.join):
            return ConvolutionTail(Pointwise(up, dtype))
        return WholeTail()

    def _tail_parameters(self, number: int) -> list[nn.Parameter]:
        if number == 0:
            head = self._head()
            return [as_parameter(p) for p in (head.weight, head.bias) if p is not None]
        up = self._up(self.layout.levels[number - 1])
        return [as_parameter(up.weight)] if is_pointwise(up, self.layout.join) else []

    def _layers(self, number: int, slices: int) -> LevelLayers:
        level = self.layout.levels[number]
        encoder, decoder = (
            split_stages(self.get_submodule(name), name) for name in (level.encoder, level.decoder)
        )
        return LevelLayers(
            encoder=encoder,
            decoder=decoder,
            pool=self._pool_kernel(level),
            slabs=cut(slices, max(1, self.tiling.slabs >> number)),  # as thick on every level
            names=(f"{level.encoder} (tiled)", f"{level.decoder} (tiled)"),
            keep=self.tiling.keep_on(number),
        )

    def _module(self, name: str, kind: type[Kind]) -> Kind:
        return find_module(self, name, kind, self.network_name)

    def _up(self, level: UNetLevel) -> nn.ConvTranspose3d:
        return self._module(level.up, nn.ConvTranspose3d)

    def _head(self) -> nn.Conv3d:
        return self._module(self.layout.head, nn.Conv3d)

    def _pool_kernel(self, level: UNetLevel) -> tuple[int, int, int]:
        kernel = self._module(level.pool, nn.MaxPool3d).kernel_size
        sides = (kernel,) * 3 if isinstance(kernel, int) else kernel
        return (sides[0], sides[1], sides[2])

    def _compute_dtype(self, image: Tensor) -> torch.dtype:
        return _compute_dtype(image, self._head().weight)

    def _check(self, image: Tensor) -> None:
        channels = self._layers_in()
        if image.dim() != 5 or image.shape[1] != channels:
            raise InputError(
                f"{self.network_name} takes images of shape (N, {channels}, A, B, C), "
                f"got {tuple(image.shape)}"
            )
        if any(side % d for side, d in zip(image.shape[2:], self.divisor, strict=True)):
            raise InputError(
                f"{self.network_name} in tiled levels needs sides that are multiples of "
                f"{self.divisor}, got {tuple(image.shape[2:])}: pad or crop the image"
            )

    def _layers_in(self) -> int:
        encoder = self.layout.levels[0].encoder
        return split_stages(self.get_submodule(encoder), encoder)[0].convolutions[0].in_channels

    def _check_layers(self) -> None:
        layout, tiled = self.layout, self.tiling.levels
        if tiled > len(layout.levels):
            raise OptionError(
                f"this {self.network_name} has {len(layout.levels)} levels that can be tiled, all "
                f"but the coarsest, got levels: {tiled}"
            )
        _check_head(self._head(), self.network_name)
        for name in (layout.bottom, *layout.untiled(tiled)):
            self._module(name, nn.Module)
        for number, level in enumerate(layout.levels):
            pool, up = (self._module(n, nn.Module) for n in (level.pool, level.up))
            if number >= tiled:
                continue
            check_upsampling(up, pool)
            for name in (level.encoder, level.decoder):
                split_stages(self._module(name, nn.Module), name)


def tile_levels(model: nn.Module, options: TiledLevelsOptions | None = None) -> TiledUNet:
    """Return the network with its finest levels run slab by slab; it shares its parameters.

    A tiled level is cut along the last axis. Convolutions read the neighbouring slabs' slices and
    zeros at the volume's true ends; a norm's statistics, and in backward its two means, come from
    a pass over all slabs before they are used. All that is not stored is made again.

    Shapes: ``(N, in_channels, A, B, slices)``, as ``FCN``. ``slices`` are cut into ``slabs`` of
        about equal thickness, each level below into half as many.
    Memory: V voxels a tiled level, m and o the channels of its decoder's convolutions, i those of
        its input, b bytes a value (2 under autocast). From forward to backward: ``conv1`` m V b
        and ``conv2`` o V b bytes, if kept; ``skip``, the encoder's last convolution, o V b; the
        pooled features o V b / 8; the features that come back up o V b / 8, or, where they are
        concatenated or come up by a wider kernel, the level below's own; and 36 bytes a channel,
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
    Networks: ``FCN``, ``LightUNet``, ``PocketNet3D`` of U-Net blocks, MONAI's ``BasicUNet``, and
        any whose class has a method ``unet_layout()`` that returns a ``UNetLayout``.
    Errors: RefusedError for another network, and for layers that cannot be cut (SyncBatchNorm,
        strided convolutions, dropout, blocks with a forward of their own); OptionError for
        levels or slabs that it does not have; InputError for a target or image that does not fit;
        BackwardError for a second backward of one forward.

    Source: recomputation after Chen et al., arXiv:1604.06174; merged variances, Chan, Golub,
    LeVeque 1983; a norm's two passes as in synchronised batch norm, slabs in place of processes.
    """
    return TiledUNet(model, options or TiledLevelsOptions())


def _check_head(head: nn.Conv3d, network: str) -> None:
    plain = head.kernel_size == (1, 1, 1) and head.stride == (1, 1, 1) and head.padding == (0, 0, 0)
    if not plain or head.groups != 1:
        raise RefusedError(
            f"the head of {network}, {head}, cannot run slab by slab: it must be a convolution of "
            "kernel 1 that keeps its input's sides"
        )


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
