"""Networks that are not ours, before and after ``memsave.apply``: MONAI's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

import memsave
from memsave.errors import RefusedError
from tests.memsave.apply_models import IN_PLACE_ATOL, compare, kept_bytes

Make = Callable[[], nn.Module]
LEAKY = ("leakyrelu", {"inplace": True, "negative_slope": 0.01})
BATCH, SIDE = 2, 32
VOXELS = BATCH * SIDE**3
FLOAT_BYTES = 4


def basic_unet() -> nn.Module:
    return BasicUNet(3, 1, 2, features=(4, 4, 8, 8, 8, 4))


def segresnet(act: object = LEAKY) -> nn.Module:
    return SegResNet(3, 8, 1, 2, act=act, blocks_down=(1, 1), blocks_up=(1,))  # type: ignore[arg-type]


def dynunet(residual: bool = True) -> nn.Module:
    return DynUNet(
        3, 1, 2, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2],
        filters=[4, 8, 8], res_block=residual, deep_supervision=False,
    )  # fmt: skip


def unet() -> nn.Module:
    return UNet(3, 1, 2, channels=(4, 8, 8), strides=(2, 2), norm="batch", num_res_units=2)


@pytest.fixture
def image() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(BATCH, 1, SIDE, SIDE, SIDE)


def _apply(make: Make, techniques: list[str], example: Tensor | None) -> tuple[nn.Module, ...]:
    torch.manual_seed(1)
    model = make()
    plain = copy.deepcopy(model)
    memsave.apply(model, techniques, example_inputs=example)
    return model, plain


IN_PLACE = [
    (basic_unet, "inplace_instance_norm", 18, 0),
    (segresnet, "inplace_group_norm", 4, 3),
    (dynunet, "inplace_instance_norm", 7, 6),
    (lambda: dynunet(residual=False), "inplace_instance_norm", 10, 0),
]
IN_PLACE_NAMES = ["BasicUNet", "SegResNet", "DynUNet residual", "DynUNet"]


@pytest.mark.parametrize(("make", "technique", "replaced", "kept"), IN_PLACE, ids=IN_PLACE_NAMES)
@pytest.mark.parametrize("traced", ["run", "symbols"])
def test_in_place_norms_compute_what_the_network_computed(
    make: Make, technique: str, replaced: int, kept: int, traced: str, image: Tensor
) -> None:
    torch.manual_seed(1)
    model = make()
    plain = copy.deepcopy(model)
    applied = memsave.apply(model, [technique], example_inputs=image if traced == "run" else None)
    assert (len(applied.replaced), len(applied.kept)) == (replaced, kept)
    assert list(model.state_dict()) == list(plain.state_dict())
    # Gradients of a leaky ReLU read off its result: about 100 roundings, through 20 layers.
    compare(model, plain, image, atol=IN_PLACE_ATOL, gradient_share=1e-2)


@pytest.mark.parametrize(("make", "technique", "replaced", "kept"), IN_PLACE, ids=IN_PLACE_NAMES)
def test_in_place_norms_keep_the_bytes_less_that_the_report_says(
    make: Make, technique: str, replaced: int, kept: int, image: Tensor
) -> None:
    del replaced, kept
    model = make()
    plain_bytes = kept_bytes(model, image)
    applied = memsave.apply(model, [technique], example_inputs=image)
    less_bytes = plain_bytes - kept_bytes(model, image)
    assert applied.saved_bytes is not None
    # Beside activations a plain norm keeps mean and 1/std of each group, an in-place one 1/std
    # (and weights without need of a copy): up to 4 numbers a channel of a sample for each norm.
    assert 0 <= less_bytes - applied.saved_bytes <= 18 * BATCH * 8 * 4 * FLOAT_BYTES


ALL = [basic_unet, segresnet, lambda: segresnet(act="relu"), dynunet, unet]
ALL_NAMES = ["BasicUNet", "SegResNet", "SegResNet ReLU", "DynUNet", "UNet batch PReLU"]


@pytest.mark.parametrize("make", ALL, ids=ALL_NAMES)
def test_recomputed_pairs_are_the_network_to_the_bit_and_keep_exactly_the_bytes_less(
    make: Make, image: Tensor
) -> None:
    torch.manual_seed(1)
    model = make()
    plain = copy.deepcopy(model)
    applied = memsave.apply(model, ["recomputed_norm_act"], example_inputs=image)
    assert applied.replaced
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    assert kept_bytes(plain, image) - kept_bytes(model, image) == applied.saved_bytes
    plain.load_state_dict(model.state_dict())
    compare(model, plain, image, atol=0, gradient_share=0)


def test_the_first_pair_of_basic_unet_saves_one_activation_of_its_channels(image: Tensor) -> None:
    applied = memsave.apply(basic_unet(), ["inplace_instance_norm"], example_inputs=image)
    first = applied.replaced[0]
    assert first.modules == ("conv_0.conv_0.adn.N", "conv_0.conv_0.adn.A")
    # 4 channels at full resolution; LeakyReLU(inplace=True) keeps its result alone
    assert first.saved_bytes == 4 * VOXELS * FLOAT_BYTES
    assert str(first) == (
        "replaced conv_0.conv_0.adn.N + conv_0.conv_0.adn.A: InstanceNorm3d + LeakyReLU by "
        "InPlaceInstanceNorm (inplace_instance_norm); saves 1.0 MiB"
    )


def test_segresnets_first_norm_of_each_block_is_kept_for_its_residual(image: Tensor) -> None:
    applied = memsave.apply(segresnet(), ["inplace_group_norm"], example_inputs=image)
    assert str(applied.kept[0]) == (
        "kept down_layers.0.1.norm1: its input is also read by add in down_layers.0.1; "
        "recomputed_norm_act takes it without changing the network"
    )
    assert {kept.modules for kept in applied.kept} == {
        ("down_layers.0.1.norm1",), ("down_layers.1.1.norm1",), ("up_layers.0.0.norm1",)
    }  # fmt: skip


def test_segresnet_with_relu_is_refused_and_named_its_twin(image: Tensor) -> None:
    model = segresnet(act="relu")
    before = repr(model)
    with pytest.raises(RefusedError, match=r"ReLU cannot be inverted.*recomputed_norm_act saves"):
        memsave.apply(model, ["inplace_group_norm"], example_inputs=image)
    assert repr(model) == before


def test_what_the_in_place_norm_refuses_goes_to_the_recomputed_one_named_after_it(
    image: Tensor,
) -> None:
    model, plain = _apply(segresnet, ["inplace_group_norm", "recomputed_norm_act"], image)
    compare(model, plain, image, atol=IN_PLACE_ATOL, gradient_share=1e-2)
    names = [type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__]
    assert sum(name.endswith("InPlaceGroupNorm") for name in names) == 4
    assert sum(name.endswith("RecomputedNormAct") for name in names) == 3


def test_prelu_is_reported_as_what_an_in_place_norm_cannot_take(image: Tensor) -> None:
    model, plain = _apply(unet, ["inplace_abn"], image)
    applied = memsave.apply(unet(), ["inplace_abn"], example_inputs=image)
    assert not applied.replaced
    assert len(applied.kept) == 9
    assert all("PReLU cannot be inverted" in kept.reason for kept in applied.kept)
    assert repr(model) == repr(plain)


def test_dynunet_with_deep_supervision_is_followed_in_training_and_evaluation(
    image: Tensor,
) -> None:
    """In training it returns a stack of several results, which only that mode makes."""

    def make() -> nn.Module:
        return DynUNet(
            3, 1, 2, kernel_size=[3, 3, 3, 3], strides=[1, 2, 2, 2],
            upsample_kernel_size=[2, 2, 2], filters=[4, 8, 8, 8], deep_supervision=True,
        )  # fmt: skip

    model, plain = _apply(make, ["inplace_instance_norm"], image)
    compare(model, plain, image, atol=IN_PLACE_ATOL, gradient_share=1e-2)


@pytest.mark.parametrize("norm", [memsave.InPlaceABN(4), memsave.InPlaceGroupNorm(2, 4)], ids=str)
def test_an_in_place_norm_takes_monai_s_own_kind_of_tensor(norm: nn.Module) -> None:
    """A MetaTensor's methods see the arguments as they are given: sizes must be a tuple."""
    from monai.data.meta_tensor import MetaTensor

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3), norm, nn.Conv3d(4, 2, 1))
    image = torch.randn(1, 1, 8, 8, 8)
    results = []
    for kind in (image, MetaTensor(image)):
        net.zero_grad()
        net(kind).sum().backward()
        results.append([p.grad.as_subclass(torch.Tensor).clone() for p in net.parameters()])  # type: ignore[union-attr]
    for plain, meta in zip(*results, strict=True):
        torch.testing.assert_close(meta, plain, rtol=0, atol=0)
