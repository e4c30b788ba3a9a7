"""Tiled levels in a suite's case: the workload's loss, its precision and its FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import memsave
from bench.build_workload import build_workload
from bench.case import Case
from bench.errors import MembenchError
from bench.flops import Flops
from bench.losses import LOSS_TARGETS, LOSSES
from bench.named_workload import is_exact, technique_names
from bench.predict.predictor import trace_case
from memsave.mixed_precision import MixedPrecision
from memsave.tiled import TiledUNet
from memsave.tiled.losses import SUMMED_LOSSES
from tests.bench.records import make_case

TILED = {"name": "tiled_levels", "options": {"slabs": 3, "levels": 2}}


def a_case(**fields: Any) -> Case:
    """A small FCN on 8x8x24 voxels, with the fields given."""
    shape = {"shape": (8, 8, 24), "requested_shape": (8, 8, 24)}
    network = {"widths": [8, 16, 16], "block": "ccblock", "norm": "batch_norm_leaky_relu"}
    case = make_case(network="fcn")
    given = {**shape, "network_options": network, **fields}
    return case.from_definition({**case.to_definition(), **given})


def losses_of(case: Case, steps: int) -> list[float]:
    """Train on the CPU; return the loss of each step."""
    workload = build_workload(case, lambda _: None, "cpu")
    measure, seen = workload.loss, []
    assert measure is not None

    def recorded(output: Tensor, target: Tensor) -> Tensor:
        loss = measure(output, target)
        seen.append(float(loss.detach()))
        return loss

    workload.loss = recorded
    for _ in range(steps):
        workload.step(lambda _: None)
    return seen


@pytest.mark.parametrize("loss", [n for n, targets in LOSS_TARGETS.items() if "classes" in targets])
def test_each_loss_summed_over_slabs_is_the_loss(loss: str) -> None:
    """In float64: value and gradient by the logits, from three slabs of unequal thickness.

    1e-13: some hundred roundings of sums in another order.
    """
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 12, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (2, 4, 5, 12))
    expected = LOSSES[loss](logits, target)
    (of_logits,) = torch.autograd.grad(expected, logits)
    summed = SUMMED_LOSSES[loss]
    parts = [(0, 2), (2, 8), (8, 12)]
    sums = [summed.sums(logits[..., a:b], target[..., a:b]) for a, b in parts]
    actual = summed.finish(torch.stack(sums).sum(0))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(actual, logits)
    torch.testing.assert_close(gradient, of_logits, rtol=1e-12, atol=1e-16)


def test_cross_entropy_leaves_ignored_voxels_out_of_its_mean() -> None:
    """Index -100 is torch's mark for them; the mean is over the others."""
    logits, target = torch.randn(1, 3, 2, 2, 4), torch.randint(3, (1, 2, 2, 4))
    target[..., 0] = -100
    summed = SUMMED_LOSSES["cross_entropy"]
    actual = summed.finish(summed.sums(logits, target))
    torch.testing.assert_close(actual, LOSSES["cross_entropy"](logits, target))


def test_a_case_trains_as_without_tiles() -> None:
    """Three steps of Adam in float32, whose losses agree to 1e-5: some hundred roundings of 6e-8.

    Adam divides by the gradient's size, so that rounding of gradients near 0 is made large.
    """
    plain, tiled = losses_of(a_case(), 3), losses_of(a_case(techniques=[TILED]), 3)
    assert tiled == pytest.approx(plain, rel=1e-5)
    assert plain[2] < plain[0]


def test_the_loss_is_computed_inside_only_while_training() -> None:
    """Training never has the logits whole; a prediction gives them."""
    training = build_workload(a_case(techniques=[TILED]), lambda _: None, "cpu")
    assert isinstance(training.model, TiledUNet)
    assert training.output().shape == ()
    infer = build_workload(a_case(techniques=[TILED], mode="infer"), lambda _: None, "cpu")
    assert infer.output().shape == (1, 3, 8, 8, 24)


def gradients_of(case: Case, precision: str) -> list[Tensor]:
    """Return one backward's gradients, unscaled, in float64."""
    fields = {**case.to_definition(), "precision": precision}
    workload = build_workload(case.from_definition(fields), lambda _: None, "cpu")
    # The first scale, 65536, overflows with so few voxels, tiled or not.
    workload.precision = MixedPrecision(workload.precision.precision, "cpu", initial_scale=256.0)
    with workload.precision.forward():
        loss = workload.loss_of(workload.output())
    workload.precision.backward(loss)
    scale = workload.precision.scaler.get_scale() if workload.precision.scaler else 1.0
    return [p.grad.double() / scale for p in workload.model.parameters() if p.grad is not None]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the norm of the difference of all gradients, relative to the second's."""
    apart = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    return float((apart / sum(float(b.square().sum()) for b in other)) ** 0.5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_is_as_exact_as_without_tiles(precision: str) -> None:
    """Against float32, tiled gradients are no farther off than 1.5 times the untiled ones.

    Both round every activation once to the half type; slabs add what float32 sums add.
    """
    reference = gradients_of(a_case(), "fp32")
    plain = distance(gradients_of(a_case(), precision), reference)
    tiled = distance(gradients_of(a_case(techniques=[TILED]), precision), reference)
    assert 0 < tiled < 1.5 * plain


def flops(**fields: Any) -> Flops:
    """Return the FLOPs of a case's second step, on the CPU's operators."""
    return trace_case(a_case(**fields), "cpu")[0].flops


@pytest.mark.parametrize("keep", [["conv1", "conv2", "gradient", "skip_gradient"], []])
def test_what_slabs_compute_again_is_all_that_they_add(keep: list[str]) -> None:
    """The forward, and the step less what is marked as computed again, cost what the plain do.

    DoubleConv: a stage of two convolutions, as CCBlock's second, computes the gradient between
    them in the halo too, which neither is.
    """
    technique = {"name": "tiled_levels", "options": {"slabs": 3, "levels": 2, "keep": keep}}
    network = {"network_options": {"widths": [8, 16, 16], "norm": "batch_norm_leaky_relu"}}
    plain, tiled = flops(**network), flops(**network, techniques=[technique])
    assert tiled.forward == plain.forward
    assert tiled.total - tiled.recomputed == plain.total
    assert tiled.recomputed > 0


@pytest.mark.parametrize(
    ("keep", "passes"),
    [
        (["conv1", "conv2", "gradient", "skip_gradient"], 0),
        (["conv1", "conv2", "skip_gradient"], 1),
        (["conv1", "gradient", "skip_gradient"], 3),
        (["conv2", "gradient", "skip_gradient"], 3),
        (["conv1", "conv2", "gradient"], 3),
        (["conv1_forward", "gradient"], 7),
        (["gradient"], 11),
        ([], 22),
    ],
)
def test_what_is_not_kept_costs_whole_convolution_passes(keep: list[str], passes: int) -> None:
    """In one slab, without halos: a pass is 64 x 32 x 27 multiply-adds a voxel, conv1 or conv2.

    The encoder's CCBlock, made again on the way, has 1.5 thousand: below a third of a pass in all.
    """
    network = {"widths": [64, 64], "block": "ccblock", "norm": "batch_norm_leaky_relu"}
    sides = {"shape": (4, 4, 4), "requested_shape": (4, 4, 4)}
    technique = {"name": "tiled_levels", "options": {"slabs": 1, "keep": keep}}
    counted = flops(network_options=network, techniques=[technique], **sides)
    one = 2 * 4**3 * 64 * 32 * 27
    assert passes <= counted.recomputed / one < passes + 0.4


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        "checkpoint",
        "checkpoint_selective",
        "offload",
        "optimizer_in_backward",
        "recomputed_norm_act",
    ],
)
def test_other_exact_techniques_change_nothing_beside_tiles(other: str, first: bool) -> None:
    """Below the tiled level, or on the optimizer, before it and after it: equal to the bit."""
    tiled = {"name": "tiled_levels", "options": {"slabs": 3}}
    uses = [{"name": other, "options": {}}, tiled] if first else [tiled, {"name": other}]
    alone, together = (
        losses_of(a_case(techniques=[tiled]), 3),
        losses_of(a_case(techniques=uses), 3),
    )
    assert together == alone


def test_apply_gives_the_tiled_network() -> None:
    """``memsave.apply`` on a model of one's own script."""
    torch.manual_seed(0)
    model = memsave.FCN(widths=(4, 8), norm="batch_norm_leaky_relu")
    applied = memsave.apply(model, [("tiled_levels", {"slabs": 2})])
    assert isinstance(applied.model, TiledUNet)
    image = torch.randn(1, 1, 4, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(applied.model.eval()(image), model.eval()(image))


def test_tiled_levels_are_exact_by_name() -> None:
    """They change the order of sums alone; see the technique."""
    case = a_case(techniques=[TILED])
    assert technique_names(case) == ("tiled_levels",)
    assert is_exact(case)


def test_a_network_that_cannot_be_tiled_is_one_line() -> None:
    """The error is one that users can repair."""
    fields = {"network": "dense_vnet", "network_options": {}, "loss": "focal"}
    with pytest.raises(MembenchError, match="DenseVNet cannot be tiled"):
        build_workload(a_case(techniques=[TILED], **fields), lambda _: None, "cpu")


def test_what_a_tiled_level_allocates_is_in_its_name() -> None:
    """Slabs run no module that could be seen: both halves of both levels, in either direction."""
    trace = trace_case(a_case(techniques=[TILED]), "cpu")[0]
    halves = {"encoder.0", "encoder.1", "decoder.0", "decoder.1"}
    named = {site.module for site in trace.sites}
    assert {f"{half} (tiled)" for half in halves} <= named
    of_slabs = [site for site in trace.sites if "memsave/tiled/" in site.source_line]
    inside = [s for s in of_slabs if "network.py" not in s.source_line]
    unnamed = [s for s in inside if not s.module.endswith("(tiled)")]
    assert len(inside) > 1000
    assert len(unnamed) < len(inside) / 50  # weights cast before a level begins
