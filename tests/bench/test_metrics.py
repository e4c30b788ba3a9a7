"""Scores against numbers worked out by hand, in mm, on grids whose sides differ."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bench.errors import MembenchError
from bench.metrics import Score, mean_score, score

pytest.importorskip("monai", reason="scores come from MONAI")

SPACING = (2.0, 1.0, 3.0)
Labels = npt.NDArray[np.uint8]


def box(
    start: tuple[int, int, int], sides: tuple[int, int, int], *, into: Labels | None = None
) -> Labels:
    labels = np.zeros((40, 30, 30), dtype=np.uint8) if into is None else into
    labels[tuple(slice(a, a + side) for a, side in zip(start, sides, strict=True))] = 1
    return labels


def only(prediction: Labels, reference: Labels, **options: Any) -> Score:
    (found,) = score(prediction, reference, SPACING, **options)
    return found


@pytest.mark.parametrize(("axis", "mm"), [(0, 2.0), (1, 1.0), (2, 3.0)])
def test_boxes_shifted_by_three_voxels(axis: int, mm: float) -> None:
    """Ten voxels long, seven shared: Dice is 7/10. The far faces are 3 voxels apart.

    Of ten planes of one box three lie outside of the other, at 1, 2 and 3 voxels: 0.6 on average.
    """
    start = [8, 8, 8]
    reference = box((8, 8, 8), (10, 10, 10))
    start[axis] += 3
    found = only(box((start[0], start[1], start[2]), (10, 10, 10)), reference)
    assert found.label == 1
    assert found.voxels == found.reference_voxels == 1000
    assert found.dice == pytest.approx(0.7)
    assert found.hausdorff_mm == pytest.approx(3 * mm)
    assert found.hausdorff_mean_mm == pytest.approx(0.6 * mm)


def test_a_part_within_another_is_outside_of_it_in_one_direction_only() -> None:
    """Plates of one voxel in x: 6 of them, and the first 4. 4 in 6: Dice 8/10.

    Planes 5 and 6 lie 2 and 4 mm outside, 1 mm on average over six; the other way is 0.
    """
    found = only(box((5, 5, 5), (4, 8, 8)), box((5, 5, 5), (6, 8, 8)))
    assert found.dice == pytest.approx(0.8)
    assert found.hausdorff_mm == pytest.approx(4.0)
    assert found.hausdorff_mean_mm == pytest.approx(0.5)


def test_the_surface_distance_is_the_mean_over_both_surfaces() -> None:
    """Single voxels 4 voxels of 2 mm apart: each is its own surface, 8 mm from the other."""
    found = only(box((3, 3, 3), (1, 1, 1)), box((7, 3, 3), (1, 1, 1)))
    assert found.surface_distance_mm == pytest.approx(8)
    assert found.hausdorff_mean_mm == pytest.approx(8)
    assert (found.dice, found.surface_dice) == (0, 0)


def test_equal_parts_agree_wherever_they_touch_the_border() -> None:
    labels = box((0, 0, 0), (40, 30, 5))
    found = only(labels, labels.copy(), tolerance_mm=0)
    assert (found.dice, found.surface_dice) == (1, 1)
    assert (found.hausdorff_mm, found.hausdorff_mean_mm, found.surface_distance_mm) == (0, 0, 0)


def test_the_surface_dice_weighs_surfaces_by_their_area() -> None:
    """One plate agrees, the other, equal in voxels, is elsewhere: its share is that of its area.

    Flat in slices, 10x10x2 voxels are 20x10x6 mm: 2(200 + 120 + 60) = 760 mm^2. Flat in x, 2x10x10
    are 4x10x30 mm: 2(40 + 120 + 300) = 920. 760 / (760 + 920) = 0.452; by voxels it would be 1/2.
    The rounding of corners takes up to 3 % of either.
    """
    prediction = box((1, 1, 1), (10, 10, 2), into=box((20, 1, 1), (2, 10, 10)))
    reference = box((1, 1, 1), (10, 10, 2), into=box((35, 18, 18), (2, 10, 10)))
    assert only(prediction, reference).surface_dice == pytest.approx(760 / 1680, rel=0.03)


def test_the_tolerance_is_in_mm_and_its_end_belongs_to_it() -> None:
    """Shifted along x by one voxel of 2 mm, no surface lies farther than 2 mm."""
    pair = box((5, 5, 5), (10, 10, 10)), box((6, 5, 5), (10, 10, 10))
    assert only(*pair, tolerance_mm=2).surface_dice == 1
    below = only(*pair, tolerance_mm=1.99).surface_dice
    assert 0.5 < below < 0.9  # all but the faces across x: 200 of 520 mm^2 and more


def test_every_label_but_the_background_is_scored_by_itself() -> None:
    prediction = box((1, 1, 1), (4, 4, 4)) * np.uint8(2)
    reference = box((1, 1, 1), (4, 4, 4)) * np.uint8(2)
    reference[20:25, 20:25, 20:25] = 5
    two, five = score(prediction, reference, SPACING)
    assert (two.label, two.dice) == (2, 1)
    assert (five.label, five.voxels, five.reference_voxels) == (5, 0, 125)


def test_a_label_that_only_one_of_them_has_agrees_in_nothing() -> None:
    empty = np.zeros((40, 30, 30), dtype=np.uint8)
    for pair in ((box((1, 1, 1), (3, 3, 3)), empty), (empty, box((1, 1, 1), (3, 3, 3)))):
        found = only(*pair)
        assert (found.dice, found.surface_dice) == (0, 0)
        assert found.hausdorff_mm is None
        assert found.hausdorff_mean_mm is None
        assert found.surface_distance_mm is None


def test_a_label_that_neither_has_agrees_in_all() -> None:
    empty = np.zeros((4, 4, 4), dtype=np.uint8)
    assert score(empty, empty, SPACING) == ()
    found = only(empty, empty, labels=[3])
    assert (found.label, found.dice, found.surface_dice) == (3, 1, 1)
    assert (found.hausdorff_mm, found.hausdorff_mean_mm, found.surface_distance_mm) == (0, 0, 0)


def test_slices_are_scored_too() -> None:
    a, b = np.zeros((2, 20, 20), dtype=np.uint8)
    a[2:12, 2:12] = 1
    b[2:12, 4:14] = 1
    (found,) = score(a, b, (1.0, 2.5))
    assert found.dice == pytest.approx(0.8)
    assert found.hausdorff_mm == pytest.approx(5)
    assert found.hausdorff_mean_mm == pytest.approx((2.5 + 5) / 10)


def test_the_mean_of_a_figure_leaves_out_labels_that_have_none() -> None:
    prediction = box((1, 1, 1), (4, 4, 4))
    reference = prediction.copy()
    reference[20:25] = 2
    scores = score(prediction, reference, SPACING)
    assert mean_score(scores, "dice") == pytest.approx(0.5)
    assert mean_score(scores, "hausdorff_mm") == 0
    assert mean_score(scores[1:], "hausdorff_mm") is None
    assert mean_score((), "dice") is None


def test_arrays_of_two_shapes_are_refused() -> None:
    with pytest.raises(MembenchError, match="has 2x3x4 voxels and the reference 2x3x5"):
        score(np.zeros((2, 3, 4)), np.zeros((2, 3, 5)), SPACING)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_is_a_distance(tolerance: float) -> None:
    labels = box((1, 1, 1), (3, 3, 3))
    with pytest.raises(MembenchError, match="in mm, 0 or more, got"):
        score(labels, labels, SPACING, tolerance_mm=tolerance)


def test_without_monai_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.metrics", None)
    labels = box((1, 1, 1), (3, 3, 3))
    with pytest.raises(MembenchError, match=r"pip install 'membench\[train\]'"):
        score(labels, labels, SPACING)
