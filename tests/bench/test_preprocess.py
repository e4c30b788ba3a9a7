"""Preprocessing: axes, intensities, sizes, boxes and components, each against a hand count."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from bench.errors import MembenchError
from bench.preprocess import (
    Box,
    fill_nonfinite,
    foreground_box,
    from_canonical,
    largest_component,
    largest_components,
    percentile_window,
    resize,
    resize_labels,
    resize_scores,
    to_canonical,
    window,
    zscore,
)

Affine = npt.NDArray[np.float64]


def affines() -> list[Affine]:
    """All 48 ways to store three axes, with spacings of 1, 2 and 3 mm."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.zeros((4, 4))
            affine[3, 3] = 1
            for stored, (world, sign) in enumerate(zip(order, signs, strict=True)):
                affine[world, stored] = sign * (world + 1)
            found.append(affine)
    return found


def world_positions(shape: tuple[int, int, int], affine: Affine) -> npt.NDArray[Any]:
    """A record of (x, y, z) in mm for each stored voxel, so that a voxel says where it lies."""
    grid = np.indices(shape).reshape(3, -1)
    positions = np.ascontiguousarray((affine[:3, :3] @ grid).T).reshape(*shape, 3)
    return positions.view([("x", float), ("y", float), ("z", float)])[..., 0]


# -- axes ---------------------------------------------------------------------------------------


def test_canonical_axes_run_along_x_y_and_slices_whatever_the_file_stores() -> None:
    for affine in affines():
        canonical = to_canonical(world_positions((2, 3, 4), affine), affine)
        x, y, z = (canonical[name] for name in "xyz")
        assert (np.diff(x, axis=0) == 1).all()
        assert (np.diff(y, axis=1) == 2).all()
        assert (np.diff(z, axis=2) == 3).all()


def test_the_way_back_from_canonical_axes_gives_the_stored_voxels() -> None:
    stored = np.arange(24).reshape(2, 3, 4)
    for affine in affines():
        assert np.array_equal(from_canonical(to_canonical(stored, affine), affine), stored)


def test_an_oblique_file_goes_to_its_closest_axes() -> None:
    """Turned by 30 degrees about z and stored z, x, y with z downwards."""
    c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])[:, [2, 0, 1]]
    affine[2, 0] = -1
    stored = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(to_canonical(stored, affine), stored.transpose(1, 2, 0)[:, :, ::-1])


# -- intensities --------------------------------------------------------------------------------


def test_what_is_no_number_becomes_the_smallest_that_is_one() -> None:
    voxels = np.array([[[np.nan, 5, -3, np.inf, -np.inf]]], dtype=np.float32)
    filled, count = fill_nonfinite(voxels)
    assert filled.tolist() == [[[-3, 5, -3, -3, -3]]]
    assert count == 3
    assert filled.dtype == np.float32
    assert np.isnan(voxels[0, 0, 0])  # the caller's stay


def test_a_finite_volume_is_not_copied() -> None:
    voxels = np.zeros((2, 2, 2), dtype=np.float32)
    assert fill_nonfinite(voxels)[0] is voxels


def test_a_volume_without_a_finite_voxel_is_refused() -> None:
    with pytest.raises(MembenchError, match="no finite voxel"):
        fill_nonfinite(np.full((2, 2, 2), np.nan, dtype=np.float32))


def test_a_window_limits_both_ends() -> None:
    voxels = np.array([[[-1000, -79, 0, 304, 3000]]], dtype=np.float32)
    assert window(voxels, -79, 304).tolist() == [[[-79, -79, 0, 304, 304]]]


def test_a_percentile_window_limits_to_its_own_percentiles() -> None:
    """Of 0..1000 the percentiles 0.5 and 99.5 are 5 and 995."""
    voxels = np.arange(1001, dtype=np.float32).reshape(1, 7, 143)
    limited = percentile_window(voxels)
    assert (limited.min(), limited.max()) == (5, 995)
    assert limited.dtype == np.float32
    assert percentile_window(voxels, 10, 80).max() == 800


def test_zscore_is_by_hand_what_it_should_be() -> None:
    """Mean 4, deviation 2."""
    scaled = zscore(np.array([[[2, 6, 2, 6]]], dtype=np.float32))
    assert scaled.tolist() == [[[-1, 1, -1, 1]]]
    assert scaled.dtype == np.float32


def test_zscore_of_equal_voxels_is_zero() -> None:
    assert zscore(np.full((2, 3, 4), 7, dtype=np.float32)).tolist() == np.zeros((2, 3, 4)).tolist()


# -- sizes --------------------------------------------------------------------------------------


def test_resize_aligns_the_edges_of_voxels() -> None:
    """Centres of 4 lie at -1/4, 1/4, 3/4 and 5/4 of 2 voxels' centres; beyond, the last holds."""
    voxels = np.array([0, 8], dtype=np.float32).reshape(1, 2, 1)
    assert resize(voxels, (1, 4, 1)).ravel().tolist() == [0, 2, 6, 8]
    assert resize(resize(voxels, (1, 4, 1)), (1, 2, 1)).ravel().tolist() == [1, 7]


def test_resize_to_the_same_size_gives_the_same_voxels_in_an_array_of_their_own() -> None:
    voxels = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    same = resize(voxels, (3, 4, 5))
    assert np.array_equal(same, voxels)
    assert not np.shares_memory(same, voxels)


def test_resize_keeps_a_ramp_a_ramp() -> None:
    """x/3 at three times the size, half a voxel's width from the ends; float32 has 7 digits."""
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None], (8, 2, 2))
    fine = resize(ramp, (24, 4, 4))
    expected = (np.arange(24) + 0.5) / 3 - 0.5
    np.testing.assert_allclose(fine[2:-2, 1, 2], expected[2:-2], rtol=0, atol=1e-5)
    back = resize(fine, (8, 2, 2))
    np.testing.assert_allclose(back[1:-1], ramp[1:-1], rtol=0, atol=1e-5)


def test_resize_takes_flipped_and_read_only_voxels() -> None:
    voxels = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    voxels.flags.writeable = False
    flipped = resize(voxels[::-1], (4, 4, 4))
    assert np.array_equal(flipped, resize(voxels, (4, 4, 4))[::-1])


def test_labels_take_the_voxel_that_holds_their_centre() -> None:
    labels = np.array([1, 2, 3, 4], dtype=np.uint8).reshape(1, 1, 4)
    assert resize_labels(labels, (1, 1, 2)).ravel().tolist() == [2, 4]
    assert resize_labels(labels, (1, 1, 6)).ravel().tolist() == [1, 2, 2, 3, 4, 4]


def test_labels_come_back_from_a_whole_multiple_of_their_size() -> None:
    labels = np.random.default_rng(0).integers(0, 5, (3, 4, 5)).astype(np.uint8)
    fine = resize_labels(labels, (9, 20, 10))
    assert fine.shape == (9, 20, 10)
    assert np.array_equal(fine[1::3, 2::5, ::2], labels)
    assert np.array_equal(resize_labels(fine, (3, 4, 5)), labels)


@pytest.mark.parametrize("shape", [(4, 5, 6), (7, 5, 3), (9, 11, 13)], ids=str)
def test_the_class_is_that_of_the_highest_interpolated_score(shape: tuple[int, int, int]) -> None:
    scores = torch.randn(5, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    expected = F.interpolate(scores[None], size=shape, mode="trilinear")[0].argmax(0)
    labels = resize_scores(scores, shape)
    assert labels.dtype == np.uint8
    assert labels.tolist() == expected.tolist()
    assert torch.equal(scores, before)


def test_of_equal_scores_the_lower_class_wins() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0]).reshape(3, 1, 1, 1)
    assert resize_scores(scores, (2, 1, 1)).ravel().tolist() == [1, 1]


# -- boxes --------------------------------------------------------------------------------------


def test_a_box_cuts_out_its_voxels() -> None:
    voxels = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    box = Box((1, 0, 2), (3, 5, 4))
    assert box.shape == (2, 5, 2)
    assert np.array_equal(voxels[box.slices], voxels[1:3, 0:5, 2:4])
    assert Box.whole((4, 5, 6)).slices == (slice(0, 4), slice(0, 5), slice(0, 6))


def test_a_scaled_box_holds_every_voxel_it_touches() -> None:
    """Of 96: 10/96 and 20/96 of 200 are 20.8 and 41.7; of 48, 5 and 10; of 96, themselves."""
    box = Box((10, 10, 10), (20, 20, 20))
    assert box.scaled((96, 96, 96), (200, 48, 96)) == Box((20, 5, 10), (42, 10, 20))
    whole = Box.whole((96, 96, 96))
    assert whole.scaled((96, 96, 96), (197, 1, 700)) == Box.whole((197, 1, 700))


sides = st.integers(1, 700)


@given(st.data(), sides, sides)
def test_a_scaled_box_covers_the_box_and_less_than_a_voxel_more(
    data: st.DataObject, old: int, new: int
) -> None:
    start = data.draw(st.integers(0, old - 1))
    stop = data.draw(st.integers(start + 1, old))
    scaled = Box((start, 0, 0), (stop, 1, 1)).scaled((old, 1, 1), (new, 1, 1))
    low, high = scaled.start[0], scaled.stop[0]
    assert 0 <= low < high <= new
    # In units of 1 / (old * new) of the axis, so that whole numbers are compared.
    assert 0 <= start * new - low * old < old
    assert 0 <= high * old - stop * new < old


def test_a_margin_is_rounded_up_and_cut_off_at_the_border() -> None:
    """5 % of 100, 101 and 19 are 5, 5.05 -> 6 and 0.95 -> 1."""
    box = Box((10, 10, 10), (90, 90, 12))
    assert box.grown(5, (100, 101, 19)) == Box((5, 4, 9), (95, 96, 13))
    border = Box((0, 3, 97), (1, 100, 100))
    assert border.grown(5, (100, 100, 100)) == Box((0, 0, 92), (6, 100, 100))


def test_the_box_is_that_of_the_largest_component() -> None:
    mask = np.zeros((10, 11, 12), dtype=bool)
    mask[1:3, 1:3, 1:3] = True  # 8 voxels
    mask[5:9, 6:7, 8:12] = True  # 16 voxels, to the border
    assert foreground_box(mask) == Box((5, 6, 8), (9, 7, 12))


def test_the_box_of_one_voxel_is_that_voxel_and_of_none_there_is_none() -> None:
    mask = np.zeros((4, 4, 4), dtype=bool)
    assert foreground_box(mask) is None
    mask[3, 0, 2] = True
    assert foreground_box(mask) == Box((3, 0, 2), (4, 1, 3))


# -- components ---------------------------------------------------------------------------------


def test_voxels_that_touch_by_a_corner_are_one_component() -> None:
    """The diagonal of 3 beats 2 side by side; by faces alone each of the 3 would be its own."""
    mask = np.zeros((5, 5, 5), dtype=bool)
    for i in range(3):
        mask[i, i, i] = True
    mask[4, 0, 0:2] = True
    kept = largest_component(mask)
    assert np.argwhere(kept).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_of_equal_components_the_first_stays() -> None:
    mask = np.zeros((5, 1, 1), dtype=bool)
    mask[[1, 3]] = True
    assert np.argwhere(largest_component(mask)).tolist() == [[1, 0, 0]]


def test_each_label_keeps_its_largest_component_alone() -> None:
    """Label 1 in parts of 1 and 2, label 3 whole beside it, label 2 absent."""
    labels = np.array([1, 0, 1, 1, 3, 3, 0, 3], dtype=np.uint8).reshape(8, 1, 1)
    kept = largest_components(labels)
    assert kept.ravel().tolist() == [0, 0, 1, 1, 3, 3, 0, 0]
    assert kept.dtype == np.uint8
    assert labels.ravel().tolist() == [1, 0, 1, 1, 3, 3, 0, 3]


def test_labels_with_no_organ_stay_empty() -> None:
    assert not largest_components(np.zeros((3, 3, 3), dtype=np.uint8)).any()
