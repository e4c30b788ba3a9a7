"""Tiled levels compute the untiled network's loss, gradients and running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsave.errors import BackwardError, InputError, OptionError, UnknownNameError
from memsave.networks.fcn import FCN
from memsave.tiled import TiledLevelsOptions, stage, tile_levels
from memsave.tiled.functions import run_encoder
from memsave.tiled.joins import make_join
from memsave.tiled.level import Keep, Level
from memsave.tiled.slabs import Read, padded
from tests.memsave.tiled_twins import Twins, assert_equal_gradients, batch_of, twins

ALL: tuple[Keep, ...] = ("conv1", "conv2", "gradient", "skip_gradient")
LOSS = "cross_entropy+dice"


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice of the foreground, written out once more."""
    p = logits.softmax(1)
    g = F.one_hot(target, 3).movedim(-1, 1).to(p.dtype)
    dims = (0, 2, 3, 4)
    dice = (2 * (p * g).sum(dims) + 1e-5) / (p.sum(dims) + g.sum(dims) + 1e-5)
    return F.cross_entropy(logits, target) + 1 - dice[1:].mean()


def step_both(pair: Twins, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Run forward and backward of both; return their losses."""
    expected = plain_loss(pair.plain(images), target)
    torch.autograd.backward(expected)
    actual = pair.tiled.training_loss(images, target, LOSS)
    torch.autograd.backward(actual)
    return actual, expected


@pytest.mark.parametrize(
    ("block", "norm", "slabs", "levels", "keep", "samples"),
    [
        ("ccblock", "inplace_abn", 1, 1, ALL, 1),
        ("ccblock", "inplace_abn", 3, 2, ALL, 2),
        ("ccblock", "batch_norm_leaky_relu", 3, 1, (), 2),
        ("ccblock", "batch_norm", 5, 2, ("conv2", "gradient", "skip"), 1),
        ("ccblock", "batch_norm_leaky_relu", 4, 2, ("conv1", "conv2"), 1),
        ("ccblock", "batch_norm_leaky_relu", 5, 2, ("conv1_forward", "gradient"), 1),
        ("ccblock", "inplace_abn", 7, 1, ("conv1_forward", "conv2", "gradient"), 1),
        ("ccblock", "batch_norm_leaky_relu", 7, 1, (*ALL, "skip"), 1),
        ("double_conv", "group_norm_leaky_relu", 3, 2, ("gradient",), 2),
        ("bottleneck", "instance_norm_leaky_relu", 2, 1, ("conv1", "skip_gradient"), 2),
        ("sepconv", "inplace_group_norm", 3, 1, ("conv1", "gradient"), 2),
        ("sepconv", "inplace_instance_norm", 3, 2, ("skip_gradient",), 1),
    ],
)
def test_a_step_equals_the_untiled_network_s(
    block: str, norm: str, slabs: int, levels: int, keep: tuple[Keep, ...], samples: int
) -> None:
    """Any block, norm and choice of what is kept; 7 pairs of slices in slabs of unequal thickness.

    Odd sides below the first pooling (3, 5), so that no halo is hidden by symmetry.
    """
    pair = twins(TiledLevelsOptions(slabs=slabs, levels=levels, keep=keep), norm=norm, block=block)
    actual, expected = step_both(pair, *batch_of((12, 20, 28), samples=samples))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    assert_equal_gradients(pair)


def test_levels_below_may_keep_something_else() -> None:
    """``keep_below`` is what the coarser tiled levels keep; an empty one keeps nothing there."""
    options = TiledLevelsOptions(slabs=3, levels=2, keep=("conv1",), keep_below=())
    assert [options.keep_on(level) for level in (0, 1)] == [{"conv1"}, set()]
    pair = twins(options)
    step_both(pair, *batch_of((8, 8, 12)))
    assert_equal_gradients(pair)


def test_in_plane_sides_may_be_odd_after_the_pooling() -> None:
    """6x10 pools to 3x5, and 14 slices to 7, one of which is a slab by itself."""
    pair = twins(TiledLevelsOptions(slabs=3), widths=(4, 8))
    actual, expected = step_both(pair, *batch_of((6, 10, 14)))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    assert_equal_gradients(pair)


def test_running_statistics_are_updated_once_a_step() -> None:
    """Mean, unbiased variance and the count of batches, however often slabs are made again."""
    pair = twins(TiledLevelsOptions(slabs=3, keep=()))
    for number in range(2):
        step_both(pair, *batch_of((8, 8, 12), seed=number))
    buffers = zip(pair.tiled.named_buffers(), pair.plain.buffers(), strict=True)
    for (name, actual), expected in buffers:
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15, msg=name)
    counts = [b for name, b in pair.tiled.named_buffers() if name.endswith("num_batches_tracked")]
    assert [int(count) for count in counts] == [2] * len(counts)


def test_running_statistics_without_momentum_are_plain_averages() -> None:
    """momentum None: each batch's share is one over the batches so far."""
    pair = twins(TiledLevelsOptions(slabs=2))
    for network in (pair.tiled, pair.plain):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.momentum = None
    for number in range(3):
        step_both(pair, *batch_of((8, 8, 12), seed=number))
    for actual, expected in zip(pair.tiled.buffers(), pair.plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_halo_one_slice_short_changes_the_gradients(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above sees it if one slice of a slab's neighbours is taken for zeros."""

    def short(read: Read, start: int, stop: int, halo: int, slices: int) -> Tensor:
        values = padded(read, start, stop, halo, slices).clone()
        if halo:
            values[..., 0 if side == "before" else -1] = 0
        return values

    monkeypatch.setattr(stage, "padded", short)
    pair = twins(TiledLevelsOptions(slabs=3))
    step_both(pair, *batch_of((8, 8, 12)))
    with pytest.raises(AssertionError):
        assert_equal_gradients(pair)


def test_slices_past_the_ends_are_zeros_and_not_neighbours() -> None:
    """At the true ends the halo is zeros, between slabs it is what lies there."""
    volume = torch.arange(1.0, 7.0).view(1, 1, 1, 1, 6)

    def read(start: int, stop: int) -> Tensor:
        return volume[..., start:stop]

    assert padded(read, 0, 2, 1, 6).flatten().tolist() == [0, 1, 2, 3]
    assert padded(read, 2, 4, 1, 6).flatten().tolist() == [2, 3, 4, 5]
    assert padded(read, 4, 6, 2, 6).flatten().tolist() == [3, 4, 5, 6, 0, 0]


def test_logits_have_gradients_for_any_loss() -> None:
    """The network called as ever: logits whole, whatever is computed of them."""
    pair = twins(TiledLevelsOptions(slabs=3, levels=2))
    images, _ = batch_of((8, 8, 12))
    for network in (pair.plain, pair.tiled):
        torch.autograd.backward(network(images).square().mean())
    assert_equal_gradients(pair)


def test_an_image_that_needs_a_gradient_gets_it() -> None:
    """The first convolution's input gradient, slab by slab."""
    pair = twins(TiledLevelsOptions(slabs=3))
    images, target = batch_of((8, 8, 12))
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    torch.autograd.backward(plain_loss(pair.plain(theirs), target))
    torch.autograd.backward(pair.tiled.training_loss(ours, target, LOSS))
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-15)


def test_frozen_parameters_get_no_gradient_and_the_others_theirs() -> None:
    """Of a frozen encoder, head and norm; the rest as untiled."""
    pair = twins(TiledLevelsOptions(slabs=3))
    for network in (pair.plain, pair.tiled):
        for frozen in ("encoder.0", "head", "decoder.1.norm1"):
            network.get_submodule(frozen).requires_grad_(False)
    step_both(pair, *batch_of((8, 8, 12)))
    for actual, expected in zip(pair.tiled.parameters(), pair.plain.parameters(), strict=True):
        if expected.grad is None:
            assert actual.grad is None
        else:
            atol = 1e-12 * float(expected.grad.abs().max()) + 1e-15
            torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=atol)


def test_evaluation_predicts_as_the_untiled_network_does() -> None:
    """With running statistics there is one pass, and nothing changes them."""
    pair = twins(TiledLevelsOptions(slabs=3, levels=2))
    step_both(pair, *batch_of((8, 8, 12)))
    before = copy.deepcopy(pair.tiled.state_dict())
    images, _ = batch_of((8, 8, 12), seed=9)
    with torch.no_grad():
        actual, expected = pair.tiled.eval()(images), pair.plain.eval()(images)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    for name, buffer in pair.tiled.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_gradients_with_frozen_statistics_equal_the_untiled_network_s() -> None:
    """Fine-tuning in evaluation mode: the norms are affine maps."""
    pair = twins(TiledLevelsOptions(slabs=3))
    pair.plain.eval()
    pair.tiled.eval()
    step_both(pair, *batch_of((8, 8, 12)))
    assert_equal_gradients(pair)


def test_a_second_backward_is_refused() -> None:
    """What is stored was overwritten by the first."""
    pair = twins(TiledLevelsOptions(slabs=3))
    loss = pair.tiled.training_loss(*batch_of((8, 8, 12)), LOSS)
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(BackwardError, match="backward once"):
        torch.autograd.backward(loss)


def test_steps_do_not_know_of_each_other() -> None:
    """Two forwards before their backwards: gradients add up as untiled."""
    pair = twins(TiledLevelsOptions(slabs=3))
    first, second = batch_of((8, 8, 12), seed=1), batch_of((8, 12, 12), seed=2)
    total = pair.plain(first[0]).new_zeros(())
    pair = twins(TiledLevelsOptions(slabs=3))
    total = sum((plain_loss(pair.plain(x), y) for x, y in (first, second)), total)
    torch.autograd.backward(total)
    losses = [pair.tiled.training_loss(x, y, LOSS) for x, y in (first, second)]
    torch.autograd.backward(torch.stack(losses).sum())
    assert_equal_gradients(pair)


def test_the_state_dict_is_the_untiled_network_s() -> None:
    """A tiled network loads and saves what the network did; its modules are the same ones."""
    network = FCN(widths=(4, 8))
    tiled = tile_levels(network, TiledLevelsOptions(slabs=2))
    assert list(tiled.state_dict()) == list(network.state_dict())
    assert tiled.encoder is network.encoder


def test_blocks_of_tiled_levels_are_not_checkpointable() -> None:
    """They are not called as modules: a checkpoint there would do nothing."""
    tiled = tile_levels(FCN(), TiledLevelsOptions(levels=2))
    expected = ("encoder.2", "encoder.3", "decoder.0")
    assert tiled.checkpointable_blocks() == expected


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: TiledLevelsOptions(slabs=0), OptionError, "slabs must be 1 or more, got 0"),
        (lambda: TiledLevelsOptions(levels=0), OptionError, "levels must be 1 or more, got 0"),
        (
            lambda: TiledLevelsOptions(keep=("conv3",)),  # type: ignore[arg-type]
            UnknownNameError,
            "unknown part to keep 'conv3'",
        ),
        (
            lambda: TiledLevelsOptions(keep=("conv1_forward", "conv2")),
            OptionError,
            "keep gradient too, or conv1; got keep:",
        ),
        (
            lambda: tile_levels(FCN(widths=(4, 8)), TiledLevelsOptions(levels=2)),
            OptionError,
            "1 levels that can be tiled, all but the coarsest, got levels: 2",
        ),
    ],
)
def test_what_cannot_be_is_said(
    make: Callable[[], object], error: type[Exception], text: str
) -> None:
    """Each mistake in one line that names what was given."""
    with pytest.raises(error, match=text):
        make()


def test_more_slabs_than_pairs_of_slices_are_refused() -> None:
    """12 slices are 6 pairs, which pooling takes together."""
    pair = twins(TiledLevelsOptions(slabs=7))
    with pytest.raises(OptionError, match="12 slices can be cut into 1 to 6 slabs"):
        pair.tiled(batch_of((8, 8, 12))[0])


def test_a_loss_or_target_that_does_not_fit_is_refused() -> None:
    """An unknown name; probabilities in place of class indices; another shape."""
    pair = twins(TiledLevelsOptions(slabs=2))
    images, target = batch_of((8, 8, 12))
    with pytest.raises(UnknownNameError, match="hinge"):
        pair.tiled.training_loss(images, target, "hinge")
    with pytest.raises(InputError, match=r"class indices of shape \(1, 8, 8, 12\)"):
        pair.tiled.training_loss(images, target.double(), LOSS)
    with pytest.raises(InputError, match=r"got torch.int64 of shape \(1, 8, 8, 10\)"):
        pair.tiled.training_loss(images, target[..., :10], LOSS)


def test_an_image_of_another_type_than_the_weights_is_refused() -> None:
    """As convolutions refuse it; under autocast there would be one type for both."""
    pair = twins(TiledLevelsOptions(slabs=2))
    with pytest.raises(InputError, match=r"weights are torch.float64, the image is torch.float32"):
        pair.tiled(batch_of((8, 8, 12))[0].float())


def test_a_gradient_that_does_not_come_through_the_decoder_is_refused() -> None:
    """The encoder's backward alone lacks half of its gradient."""
    pair = twins(TiledLevelsOptions(slabs=2))
    images, _ = batch_of((8, 8, 12))
    layers, up = pair.tiled._layers(0, 12), pair.tiled._up(pair.tiled.layout.levels[0])
    join = make_join(up, "sum", layers.slabs, images.dtype)
    level = Level(layers, join, images, images.dtype, training=True)
    pooled = run_encoder(level, images)
    with pytest.raises(BackwardError, match="must depend on the network's output"):
        torch.autograd.backward(pooled.sum())
