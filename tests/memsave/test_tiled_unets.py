"""Tiled levels of any U-Net that says what its levels are made of: gradients, bytes, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsave
from memsave.errors import InputError, OptionError, RefusedError
from memsave.networks import build
from memsave.tiled import TiledLevelsOptions, UNetLayout, UNetLevel, tile_levels
from memsave.tiled.joins import JoinOrder
from memsave.tiled.level import Keep
from tests.memsave.traced_bytes import traced_kept_bytes

DEFAULT: tuple[Keep, ...] = ("conv1", "conv2", "gradient", "skip_gradient")


def convolutions(channels: Sequence[int], norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    """Return 3-wide convolutions with biases, each with its norm, if any, and an ELU."""
    layers: list[nn.Module] = []
    for i, o in pairwise(channels):
        layers.append(nn.Conv3d(i, o, 3, padding=1))
        layers += [] if norm is None else [norm(o)]
        layers.append(nn.ELU())
    return nn.Sequential(*layers)


class OwnUNet(nn.Module):
    """A user's U-Net of three levels, whose decoders have as many convolutions as told."""

    def __init__(
        self,
        join: JoinOrder = "skip_first",
        *,
        norm: Callable[[int], nn.Module] | None = None,
        decoder_convolutions: int = 2,
        pool: tuple[int, int, int] = (2, 2, 2),
        kernel: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.join = join
        widths = (4, 6, 5)
        self.down = nn.ModuleList(
            convolutions((i, o, o), norm) for i, o in zip((2, 4, 6), widths, strict=True)
        )
        self.pools = nn.ModuleList(nn.MaxPool3d(pool) for _ in range(2))
        sizes = pool if kernel is None else (kernel,) * 3
        rest = (pool[0] - sizes[0], pool[1] - sizes[1], pool[2] - sizes[2])
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(i, o, sizes, stride=pool, output_padding=rest, bias=bias)
            for i, o in ((6, 4), (5, 6))
        )
        double = 1 if join == "sum" else 2
        self.back = nn.ModuleList(
            convolutions((double * o, *[o] * decoder_convolutions), norm) for o in (4, 6)
        )
        self.last = nn.Conv3d(4, 3, 1)

    def unet_layout(self) -> UNetLayout:
        """Name the levels."""
        levels = tuple(
            UNetLevel(encoder=f"down.{i}", pool=f"pools.{i}", up=f"ups.{i}", decoder=f"back.{i}")
            for i in range(2)
        )
        return UNetLayout(levels=levels, bottom="down.2", head="last", join=self.join)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, as anyone would write it."""
        skips = []
        features = image
        for i in range(2):
            skips.append(self.down[i](features))
            features = self.pools[i](skips[-1])
        features = self.down[2](features)
        for i in (1, 0):
            upsampled, skip = self.ups[i](features), skips.pop()
            if self.join == "sum":
                joined = upsampled + skip
            elif self.join == "skip_first":
                joined = torch.cat([skip, upsampled], 1)
            else:
                joined = torch.cat([upsampled, skip], 1)
            features = self.back[i](joined)
        logits: Tensor = self.last(features)
        return logits


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    network.zero_grad()
    torch.autograd.backward(loss)
    return [cast(Tensor, p.grad).clone() for p in network.parameters()]


def assert_same_step(
    network: nn.Module,
    options: TiledLevelsOptions,
    shape: Sequence[int],
    channels: int,
    classes: int,
) -> None:
    """Loss, every gradient, the image's and the running statistics, in float64.

    1e-12 of the network's largest gradient: thousands of roundings of 1.1e-16, for sums over some
    thousand voxels in another order; a bias in front of a norm has no gradient but rounding.
    """
    torch.manual_seed(0)
    plain = network.double()
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, -0.4, 0.5)
    tiled = tile_levels(copy.deepcopy(plain), options)
    images = torch.randn(2, channels, *shape, dtype=torch.float64)
    target = torch.randint(classes, (2, *shape))
    theirs, ours = images.clone().requires_grad_(), images.clone().requires_grad_()
    expected = loss_of(plain(theirs), target)
    actual = tiled.training_loss(ours, target, "cross_entropy")
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    wanted = gradients(plain, expected)
    largest = max(float(g.abs().max()) for g in wanted)
    assert largest > 0
    for (name, parameter), found, want in zip(
        tiled.named_parameters(), gradients(tiled, actual), wanted, strict=True
    ):
        assert found.shape == parameter.shape
        worst = float((found - want).abs().max())
        assert worst <= 1e-12 * largest, f"{name}: {worst:.1e} off"
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12 * largest)
    for found, want in zip(tiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("keep", [DEFAULT, (), ("conv1_forward", "gradient"), ("conv2", "skip")])
@pytest.mark.parametrize("join", ["sum", "skip_first", "upsampled_first"])
def test_a_network_of_one_s_own_has_its_gradients(join: JoinOrder, keep: tuple[Keep, ...]) -> None:
    """Skips added or beside the upsampled features; ten slices in slabs of unequal thickness."""
    network = OwnUNet(join, norm=nn.BatchNorm3d)
    options = TiledLevelsOptions(slabs=3, levels=1, keep=keep)
    assert_same_step(network, options, (4, 4, 20), 2, 3)


@pytest.mark.parametrize(
    ("network", "keep"),
    [
        (lambda: OwnUNet(), DEFAULT),
        (lambda: OwnUNet("sum"), ()),
        (lambda: OwnUNet(decoder_convolutions=1), DEFAULT),
        (lambda: OwnUNet(decoder_convolutions=1), ("conv1",)),
        (lambda: OwnUNet(decoder_convolutions=3, norm=nn.BatchNorm3d), DEFAULT),
        (lambda: OwnUNet(decoder_convolutions=3), ("gradient",)),
        (lambda: OwnUNet(decoder_convolutions=3), ("conv1_forward", "gradient")),
        (lambda: OwnUNet(pool=(1, 2, 2), norm=lambda c: nn.GroupNorm(1, c)), DEFAULT),
        (lambda: OwnUNet("sum", pool=(2, 1, 2)), DEFAULT),
        (lambda: OwnUNet("sum", kernel=1), DEFAULT),
        (lambda: OwnUNet("sum", kernel=1, bias=False), ()),
        (lambda: OwnUNet("skip_first", kernel=1), ("skip_gradient",)),
        (lambda: OwnUNet(norm=lambda c: nn.InstanceNorm3d(c, affine=True), bias=False), ("skip",)),
    ],
)
def test_levels_of_other_makes_have_their_gradients(
    network: Callable[[], nn.Module], keep: tuple[Keep, ...]
) -> None:
    """Without norms; one and three convolutions; sides that are not pooled; kernels of 1."""
    options = TiledLevelsOptions(slabs=4, levels=2, keep=keep)
    assert_same_step(network(), options, (4, 8, 20), 2, 3)


@pytest.mark.parametrize(
    ("name", "options", "shape", "classes"),
    [
        ("light_unet", {"widths": [4, 6, 8]}, (4, 4, 20), 2),
        ("light_unet", {"widths": [4, 6], "norm": "batch_norm"}, (2, 4, 12), 2),
        ("pocketnet_3d", {"widths": [4, 4, 4]}, (3, 4, 20), 2),
    ],
)
def test_the_other_u_nets_have_their_gradients(
    name: str, options: dict[str, Any], shape: tuple[int, int, int], classes: int
) -> None:
    """PocketNet's volumes have their slices first, any number of them: they are never pooled."""
    tiles = TiledLevelsOptions(slabs=4, levels=len(options["widths"]) - 1)
    assert_same_step(build(name, options), tiles, shape, 1, classes)


def test_monai_s_basic_u_net_has_its_gradients() -> None:
    """Known by its modules: instance norms behind convolutions with biases, dropout of 0."""
    nets = pytest.importorskip("monai.networks.nets")
    network = nets.BasicUNet(spatial_dims=3, features=(4, 4, 6, 6, 8, 4))
    assert_same_step(network, TiledLevelsOptions(slabs=5, levels=2), (16, 16, 48), 1, 2)


def test_apply_tiles_a_network_of_one_s_own() -> None:
    """Its names stay, and what is below can be checkpointed beside it."""
    network = OwnUNet()
    names = list(network.state_dict())
    applied = memsave.apply(network, [("tiled_levels", {"slabs": 2}), "checkpoint"])
    assert list(applied.model.state_dict()) == names
    tiled = cast(memsave.TiledUNet, applied.model)
    assert tiled.checkpointable_blocks() == ("down.1", "down.2", "back.1")
    assert type(tiled.get_submodule("down.2")).__name__ == "CheckpointedSequential"
    image = torch.randn(1, 2, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(tiled(image), network(image))


@pytest.mark.parametrize("technique", ["inplace_abn", "recomputed_norm_act"])
def test_norms_that_apply_replaced_run_slab_by_slab(technique: str) -> None:
    """An activation whose norm applies it rests: it is not applied twice.

    In-place ABN's own gradients come from inverting its result, 1e-10 being a million roundings.
    """
    torch.manual_seed(0)
    plain = OwnUNet(norm=nn.BatchNorm3d).double()
    images, target = torch.randn(1, 2, 8, 8, 8).double(), torch.randint(3, (1, 8, 8, 8))
    changed = memsave.apply(copy.deepcopy(plain), [technique], example_inputs=images).model
    tiled = tile_levels(copy.deepcopy(changed), TiledLevelsOptions(slabs=2))
    expected = gradients(plain, loss_of(plain(images), target))
    actual = gradients(tiled, tiled.training_loss(images, target, "cross_entropy"))
    largest = max(float(g.abs().max()) for g in expected)
    eps = 1e-5 if technique == "inplace_abn" else 0  # its scale is |weight| + eps
    for found, want in zip(actual, expected, strict=True):
        assert float((found - want).abs().max()) <= max(1e-10, 30 * eps) * largest


def test_a_tiled_network_can_be_copied_and_pickled() -> None:
    """As DataParallel and checkpoints of whole models do."""
    tiled = tile_levels(build("light_unet", {"widths": [4, 6]}), TiledLevelsOptions(slabs=2))
    image = torch.randn(1, 1, 4, 4, 8)
    expected = tiled.eval()(image)
    for other in (copy.deepcopy(tiled), pickle.loads(pickle.dumps(tiled))):
        assert torch.equal(other(image), expected)


SHAPE = (4, 8, 20)


def kept_bytes(keep: tuple[Keep, ...]) -> int:
    def prepare() -> Callable[[], Tensor]:
        tiled = tile_levels(OwnUNet(), TiledLevelsOptions(slabs=5, keep=keep))
        images, target = torch.randn(1, 2, *SHAPE), torch.randint(3, (1, *SHAPE))
        return lambda: tiled.training_loss(images, target, "cross_entropy")

    return traced_kept_bytes(prepare)


@pytest.mark.parametrize(
    ("keep", "channels"), [(("conv1", "conv2"), 8), (("conv1",), 4), (("skip",), 4)]
)
def test_what_is_kept_of_one_s_own_costs_its_channels(
    keep: tuple[Keep, ...], channels: int
) -> None:
    """Each of the level's convolutions has 4 channels, in float32 at full resolution."""
    assert kept_bytes(keep) - kept_bytes(()) == channels * 4 * 8 * 20 * 4


class Unknown(nn.Module):
    """Not a U-Net that anyone knows."""


def changed(**fields: Any) -> nn.Module:
    """Return the network with other modules in place of its own."""
    network = OwnUNet()
    for name, module in fields.items():
        parent, _, child = name.rpartition("__")
        setattr(network.get_submodule(parent), child, module)
    return network


class Named(OwnUNet):
    """The network with another layout."""

    def __init__(self, layout: object) -> None:
        super().__init__()
        self._layout = layout

    def unet_layout(self) -> UNetLayout:
        """Return whatever was given."""
        return cast(UNetLayout, self._layout)


LEVEL = UNetLevel(encoder="down.0", pool="pools.0", up="ups.0", decoder="back.0")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Unknown, r"Unknown cannot be tiled: .* unet_layout\(\) that returns a memsave.UNetLayout"),
        (lambda: build("dense_vnet"), "DenseVNet cannot be tiled: what its levels are made of"),
        (lambda: build("conv_lstm"), "ConvLSTM cannot be tiled"),
        (lambda: build("pocketnet_2d"), "PocketNet2D cannot be tiled"),
        (
            lambda: build("pocketnet_3d", {"block": "resnet"}),
            "ResNetBlock3D in encoder.0 cannot run slab by slab: its forward is its own",
        ),
        (lambda: Named("down"), r"of Named must return a memsave.UNetLayout, got str"),
        (
            lambda: Named(UNetLayout(levels=(LEVEL,), bottom="b", head="last", join="sum")),
            "Named has no module 'b', which its unet_layout names",
        ),
        (
            lambda: Named(UNetLayout(levels=(LEVEL,), bottom="down.2", head="down.0", join="sum")),
            "down.0 of Named is a Sequential: a tiled U-Net needs nn.Conv3d there",
        ),
        (lambda: changed(__last=nn.Conv3d(4, 3, 3)), "the head of OwnUNet, .* kernel 1"),
        (lambda: changed(pools__0=nn.AvgPool3d(2)), "levels are joined by nn.MaxPool3d"),
        (lambda: changed(pools__0=nn.MaxPool3d(3, 2, 1)), "its stride must be its kernel"),
        (lambda: changed(pools__0=nn.MaxPool3d((2, 2, 1))), "2 along the last axis"),
        (lambda: changed(ups__0=nn.Upsample(scale_factor=2)), "Upsample cannot run slab by slab"),
        (
            lambda: changed(ups__0=nn.ConvTranspose3d(6, 4, 4, stride=2, padding=1)),
            "it must undo the pooling of",
        ),
        (lambda: changed(down__0=nn.Conv3d(2, 4, 2)), "must keep its input's sides"),
        (lambda: changed(down__0=nn.ReLU()), "ReLU stands at the beginning of down.0"),
        (lambda: changed(down__0=nn.Sequential()), "down.0 has no convolution"),
        (
            lambda: changed(down__0=nn.Sequential(*[nn.Conv3d(2, 2, 3, padding=1), nn.ReLU()] * 2)),
            "Conv3d stands in down.0 twice",
        ),
        (
            lambda: changed(back__0=nn.Sequential(nn.Conv3d(8, 4, 1), nn.PReLU())),
            "PReLU in back.0 cannot run slab by slab",
        ),
        (
            lambda: changed(back__0=nn.Sequential(nn.Conv3d(8, 4, 1), nn.Dropout3d(0.2))),
            r"Dropout3d\(p=0.2\) in back.0 .* set its p to 0",
        ),
        (
            lambda: changed(__offset=nn.Parameter(torch.zeros(1))),
            "OwnUNet cannot be tiled: it has 'offset' of its own",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_tiled_is_one_line(make: Callable[[], nn.Module], text: str) -> None:
    """Which module, what it is, and what a tiled level needs."""
    with pytest.raises(RefusedError, match=text) as raised:
        tile_levels(make())
    assert "\n" not in str(raised.value)


def test_a_layout_says_how_skips_are_joined() -> None:
    with pytest.raises(OptionError, match="join must be one of sum, skip_first, upsampled_first"):
        UNetLayout(levels=(LEVEL,), bottom="b", head="h", join="add")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one level or more above its bottom, got none"):
        UNetLayout(levels=(), bottom="b", head="h", join="sum")


def test_an_image_that_does_not_pool_evenly_is_refused() -> None:
    """By the network's name, with what its sides must be multiples of."""
    tiled = tile_levels(OwnUNet(pool=(1, 2, 2)))
    with pytest.raises(InputError, match=r"OwnUNet .* multiples of \(1, 4, 4\), got \(3, 4, 10\)"):
        tiled(torch.randn(1, 2, 3, 4, 10))
    with pytest.raises(InputError, match=r"OwnUNet takes images of shape \(N, 2, A, B, C\)"):
        tiled(torch.randn(1, 3, 4, 4, 8))
