"""A norm and activation seen slab by slab, against the layer whole; and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memsave.errors import RefusedError
from memsave.in_place_abn import InPlaceABN
from memsave.in_place_abn_sync import InPlaceABNSync
from memsave.recomputed_norm_act import RecomputedNormAct
from memsave.tiled import norm as norm_module
from memsave.tiled.convolutions import Convolutions, check_layers
from memsave.tiled.layers import split_stages
from memsave.tiled.norm import SlabNorm
from memsave.tiled.norm_rules import NormRule
from memsave.tiled.slabs import Arena, SlabStore

CUTS = [(0, 1), (1, 5), (5, 7)]


def norm_rule(layer: nn.Module) -> NormRule:
    """Return what stands behind a convolution in a level."""
    (stage,) = split_stages(nn.Sequential(nn.Conv3d(1, 4, 1), layer))
    return stage.rule


def run(layer: nn.Module, x: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return result, input gradient and parameter gradients, by slabs of unequal thickness."""
    norm = SlabNorm(norm_rule(layer), x.shape[0], x.shape[1], x.dtype)
    slabs = [(x[..., a:b], dz[..., a:b]) for a, b in CUTS]
    for part, _ in slabs:
        norm.observe(part)
    norm.settle()
    for part, gradient in slabs:
        norm.observe_gradient(part, gradient)
    norm.settle_gradient()
    result = torch.cat([norm.apply(part) for part, _ in slabs], dim=-1)
    dx = torch.cat([norm.gradient(part, gradient) for part, gradient in slabs], dim=-1)
    return result, dx, list(norm.gradients().values())


LAYERS = {
    "batch norm, ELU": nn.Sequential(nn.BatchNorm3d(4), nn.ELU(0.7)),
    "batch norm alone": nn.Sequential(nn.BatchNorm3d(4), nn.Identity()),
    "ReLU, batch norm": nn.Sequential(nn.ReLU(), nn.BatchNorm3d(4)),
    "leaky ReLU, group norm": nn.Sequential(nn.LeakyReLU(0.2), nn.GroupNorm(2, 4)),
    "ELU, instance norm": nn.Sequential(nn.ELU(), nn.InstanceNorm3d(4, affine=True)),
    "without weights": nn.Sequential(nn.BatchNorm3d(4, affine=False), nn.ReLU()),
    "no running statistics": nn.Sequential(nn.BatchNorm3d(4, track_running_stats=False), nn.ReLU()),
    "recomputed pair": RecomputedNormAct(nn.BatchNorm3d(4), nn.ReLU(), order="act_norm"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("parts", [1, 3])
def test_slabs_give_what_the_layer_gives(
    name: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, two samples; the arithmetic on all channels or some at a time."""
    monkeypatch.setattr(norm_module, "_PART_ELEMENTS", 1)
    monkeypatch.setattr(norm_module, "_PARTS", parts)
    torch.manual_seed(0)
    layer = LAYERS[name].double().train()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(2, 4, 3, 2, 7, dtype=torch.float64) + 1
    dz = torch.randn_like(x)
    whole = x.clone().requires_grad_()
    expected = layer(whole)
    dx, *of_parameters = torch.autograd.grad(expected, [whole, *layer.parameters()], dz)
    # Sums of 84 numbers in another order: 1e-13 of values of order 1 are hundreds of roundings.
    result, actual, parameters = run(layer, x, dz)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(actual, dx, rtol=0, atol=1e-13)
    torch.testing.assert_close(parameters, of_parameters, rtol=0, atol=1e-12)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """Float32, mean 1000 and variance 1: sums of squares would have lost the variance.

    Its rounding, 1000 * 6e-8, is what the input itself has lost; the layer's own result, too.
    """
    torch.manual_seed(0)
    x = torch.randn(1, 4, 8, 8, 7) + 1000
    layer = nn.Sequential(nn.BatchNorm3d(4), nn.Identity())
    exact = nn.functional.batch_norm(x.double(), None, None, training=True)
    result, _, _ = run(layer, x, torch.zeros_like(x))
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=3e-4)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Sequential(nn.BatchNorm3d(4), nn.GELU()), "GELU in Sequential cannot run slab by slab"),
        (nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU()), "cannot run slab by slab: take a batch"),
        (nn.Sequential(nn.Dropout(), nn.ReLU()), r"Dropout\(p=0.5\) in .* each slab would draw"),
        (InPlaceABNSync(4), "InPlaceABNSync in Sequential cannot run slab by slab"),
        (nn.Sequential(nn.ReLU(), nn.ELU()), "ReLU in Sequential cannot run slab by slab"),
        (
            nn.Sequential(nn.ReLU(), nn.BatchNorm3d(4), nn.ELU()),
            "ReLU, BatchNorm3d, ELU in Sequential .* at most a norm and an activation",
        ),
        (nn.LocalResponseNorm(2), "LocalResponseNorm in Sequential cannot run slab by slab"),
        (
            nn.Sequential(nn.InstanceNorm3d(4, track_running_stats=True), nn.ReLU()),
            "InstanceNorm3d in Sequential cannot run slab by slab",
        ),
    ],
)
def test_norms_that_cannot_be_cut_are_refused(layer: nn.Module, text: str) -> None:
    """Statistics of other processes, unknown activations, running statistics a sample."""
    with pytest.raises(RefusedError, match=text):
        norm_rule(layer)


def test_an_in_place_norm_s_rule_is_its_function() -> None:
    """The activation and its parameter are read off the layer."""
    rule = norm_rule(InPlaceABN(4, activation="elu", activation_param=0.3))
    assert (rule.activation, rule.parameter, rule.in_place) == ("elu", 0.3, True)


CHAINS = {
    "wide": [nn.Conv3d(4, 6, 3, padding=1)],
    "5-wide": [nn.Conv3d(4, 4, 5, padding=2, bias=False)],
    "depthwise, pointwise": [nn.Conv3d(4, 4, 3, padding=1, groups=4), nn.Conv3d(4, 6, 1)],
    "groups": [nn.Conv3d(4, 6, 3, padding="same", groups=2, bias=False)],
    "pointwise, depthwise": [
        nn.Conv3d(4, 6, 1, bias=False),
        nn.Conv3d(6, 6, (3, 1, 3), padding=(1, 0, 1), groups=6),
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_convolutions_on_a_slab_give_their_part_of_all_gradients(name: str) -> None:
    """Input and weight gradients from two slabs and their halos, with bias and groups."""
    torch.manual_seed(0)
    layers = [layer.double() for layer in CHAINS[name]]
    convolutions = Convolutions(layers, torch.float64)
    halo = convolutions.halo
    x = torch.randn(2, 4, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    result = nn.Sequential(*layers)(x)
    dc = torch.randn_like(result)
    parameters = [p for layer in layers for p in layer.parameters()]
    dx, *expected = torch.autograd.grad(result, [x, *parameters], dc)
    wide_x, wide_dc = (nn.functional.pad(t.detach(), (halo, halo)) for t in (x, dc))
    parts = []
    for start, stop in ((0, 3), (3, 8)):
        around = slice(start, stop + 2 * halo)
        part = convolutions.forward(wide_x[..., around])
        torch.testing.assert_close(part, result[..., start:stop], rtol=0, atol=1e-13)
        convolutions.add_weight_gradients(wide_x[..., around], dc[..., start:stop])
        parts.append(convolutions.input_gradient(wide_dc[..., around]))
    torch.testing.assert_close(torch.cat(parts, -1), dx, rtol=0, atol=1e-13)
    found = convolutions.gradients()
    torch.testing.assert_close([found[p] for p in parameters], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([nn.Conv3d(1, 1, 3, stride=2, padding=1)], "must keep its input's sides"),
        ([nn.Conv3d(1, 1, 3)], "must keep its input's sides"),
        ([nn.Conv3d(1, 1, 2, padding=1)], "must keep its input's sides"),
        ([nn.Conv3d(1, 1, 3, padding=1, padding_mode="circular")], "zeros as padding"),
        ([nn.Conv3d(1, 1, 3, padding=1), nn.Conv3d(1, 1, 3, padding=1)], "a wide one"),
        ([nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 3, padding=1)], "follows a convolution with a bias"),
    ],
)
def test_convolutions_that_cannot_be_cut_are_refused(layers: list[nn.Conv3d], text: str) -> None:
    """What is beyond the volume's end must be zeros for every convolution."""
    with pytest.raises(RefusedError, match=text):
        check_layers(layers)


@pytest.mark.parametrize("blocks", [0, 1, 9])
def test_a_store_reads_back_any_slices(blocks: int) -> None:
    """Across slabs, with channels in several blocks; from an arena too small, or without one."""
    values = torch.randn(2, 5, 2, 3, 7)
    arena = Arena(2, (2, 2, 3, 4), values)
    arena.grow(blocks)
    for store in (SlabStore(arena), SlabStore()):
        for start, stop in CUTS:
            store.append(start, values[..., start:stop])
        for start in range(7):
            for stop in range(start + 1, 8):
                assert torch.equal(store.read(start, stop), values[..., start:stop])
        store.write(1, values[..., 1:5] * 2)
        assert torch.equal(store.read(0, 3), torch.cat([values[..., :1], values[..., 1:3] * 2], -1))
        store.release_before(4)
        assert torch.equal(store.read(4, 7)[..., 0], values[..., 4] * 2)
        with pytest.raises(AssertionError, match="released"):
            store.read(3, 5)
        store.clear()


def test_blocks_given_back_are_taken_again() -> None:
    """Slabs that go make room for slabs that come: no memory beyond the arena's."""
    arena = Arena(2, (1, 2, 2, 4), torch.zeros(()))
    arena.grow(3)
    first, second = SlabStore(arena), SlabStore(arena)
    first.append(0, torch.ones(1, 4, 2, 2, 4))
    places = {part.data_ptr() for piece in first._pieces for part in piece.parts}
    first.release_before(4)
    second.append(0, torch.zeros(1, 4, 2, 2, 4))
    assert {part.data_ptr() for piece in second._pieces for part in piece.parts} == places
