"""The losses, against numbers worked out by hand, and what they do under autocast."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.errors import MembenchError
from bench.losses import (
    LOSS_TARGETS,
    LOSSES,
    binary_cross_entropy,
    check_loss,
    cross_entropy_and_dice,
    focal,
    l2_dice,
    soft_dice,
)
from memsave.networks import NETWORKS

# Two voxels: p of class 1 is 3/4 and 1/5. Softmax of (0, log(p / (1 - p))).
LOGITS = torch.tensor([[[0.0, 0.0], [math.log(3), math.log(1 / 4)]]], dtype=torch.float64)
TARGET = torch.tensor([[1, 0]])
P_TARGET = (3 / 4, 4 / 5)  # of each voxel's own class


def test_dice_counts_the_foreground_alone() -> None:
    """Overlap 3/4, sums 3/4 + 1/5 and 1; background left out."""
    assert soft_dice(LOGITS, TARGET, smooth=0).item() == pytest.approx(1 - 1.5 / 1.95)


def test_cross_entropy_and_dice_are_summed() -> None:
    expected = -sum(map(math.log, P_TARGET)) / 2 + soft_dice(LOGITS, TARGET).item()
    assert cross_entropy_and_dice(LOGITS, TARGET).item() == pytest.approx(expected)


def test_focal_weighs_a_voxel_by_how_unsure_it_is() -> None:
    """(1/16 log(4/3) + 1/25 log(5/4)) / 2 at gamma 2."""
    expected = (math.log(4 / 3) / 16 + math.log(5 / 4) / 25) / 2
    assert focal(LOGITS, TARGET).item() == pytest.approx(expected, rel=1e-12)


def test_focal_of_gamma_0_is_cross_entropy() -> None:
    expected = LOSSES["cross_entropy"](LOGITS, TARGET)
    assert focal(LOGITS, TARGET, gamma=0).item() == pytest.approx(expected.item(), rel=1e-12)


def test_focal_has_a_gradient_where_it_is_sure() -> None:
    logits = torch.tensor([[[-200.0], [200.0]]], requires_grad=True)
    torch.autograd.backward(focal(logits, torch.tensor([[1]])))
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_binary_cross_entropy_is_that_of_probabilities() -> None:
    """-(log(3/4) + log(1 - 1/5)) / 2."""
    p = torch.tensor([[[3 / 4, 1 / 5]]], dtype=torch.float64)
    g = torch.tensor([[[1.0, 0.0]]])
    expected = -(math.log(3 / 4) + math.log(4 / 5)) / 2
    assert binary_cross_entropy(p, g).item() == pytest.approx(expected, rel=1e-12)


def test_binary_cross_entropy_of_a_sure_mistake_is_100_and_finite_in_backward() -> None:
    p = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    loss = binary_cross_entropy(p, torch.tensor([[[1.0, 0.0]]]))
    torch.autograd.backward(loss)
    assert loss.item() == 100
    assert p.grad is not None
    assert p.grad.isfinite().all()


def test_l2_dice_of_a_mask_squares_the_probabilities() -> None:
    """p (3/4, 1/5), g (1, 0): 1 - 2 (3/4) / (9/16 + 1/25 + 1)."""
    p = torch.tensor([[[3 / 4, 1 / 5]]], dtype=torch.float64)
    g = torch.tensor([[[1.0, 0.0]]])
    expected = 1 - 1.5 / (9 / 16 + 1 / 25 + 1)
    assert l2_dice(p, g, smooth=0).item() == pytest.approx(expected, rel=1e-12)


def test_l2_dice_of_classes_is_that_of_the_foregrounds_mask() -> None:
    expected = 1 - 1.5 / (9 / 16 + 1 / 25 + 1)
    assert l2_dice(LOGITS, TARGET, smooth=0).item() == pytest.approx(expected, rel=1e-12)


def test_l2_dice_sums_over_the_classes_of_the_foreground() -> None:
    """Three equal classes, targets 2 and 0: 1 - 2 (1/3) / (4/9 + 1)."""
    logits = torch.zeros(1, 3, 2, dtype=torch.float64)
    expected = 1 - (2 / 3) / (4 / 9 + 1)
    value = l2_dice(logits, torch.tensor([[2, 0]]), smooth=0)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_l2_dice_of_nothing_found_where_there_is_nothing_is_1_and_no_nan() -> None:
    nothing = torch.zeros(1, 1, 4)
    assert l2_dice(nothing, nothing).item() == 1


def _batch(target: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    if target == "mask":
        return torch.rand(2, 2, 3, 4), torch.randint(2, (2, 2, 3, 4)).float()
    return torch.randn(2, 3, 3, 4), torch.randint(3, (2, 3, 4))


@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name in LOSSES for target in LOSS_TARGETS[name]]
)
def test_a_loss_has_the_gradient_of_its_value(name: str, target: str) -> None:
    output, truth = _batch(target)
    output = output.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda o: LOSSES[name](o, truth), (output,))


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "binary_cross_entropy", "l2_dice"])
def test_a_loss_runs_under_autocast_in_float32(name: str) -> None:
    """On bfloat16 outputs it is that of the same outputs in float32, to a few roundings."""
    for target in LOSS_TARGETS[name]:
        output, truth = _batch(target)
        half = output.bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = LOSSES[name](half, truth)
        torch.autograd.backward(loss)
        assert loss.dtype == torch.float32
        expected = LOSSES[name](half.detach().float(), truth)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-6)
        assert half.grad is not None
        assert half.grad.isfinite().all()


def test_every_loss_says_which_targets_it_takes() -> None:
    assert LOSS_TARGETS.keys() == LOSSES.keys()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_networks_own_loss_takes_its_target(network: str) -> None:
    spec = NETWORKS[network]
    check_loss(spec.loss, spec.target)


def test_a_loss_of_another_target_is_refused_with_those_that_would_do() -> None:
    with pytest.raises(
        MembenchError, match=r"'focal' takes classes, .* use binary_cross_entropy or"
    ):
        check_loss("focal", "mask")
    with pytest.raises(MembenchError, match=r"takes mask, the network is trained towards classes"):
        check_loss("binary_cross_entropy", "classes")
    with pytest.raises(MembenchError, match=r"unknown loss 'focl' .did you mean 'focal'"):
        check_loss("focl", "classes")
