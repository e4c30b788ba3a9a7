"""Memory against input size: the line, its limits, and what belongs to one series."""

from __future__ import annotations

from typing import Any

import pytest

from bench.record import Record
from bench.scaling import Line, Series, fit_line, largest_shape, make_series
from tests.bench.records import GIB, make_record


def sized(shape: tuple[int, ...], needs: int, **overrides: Any) -> Record:
    """A record that needs so many bytes, 0.5 GiB of context included."""
    return make_record(requested_shape=shape, needs_bytes=needs - GIB // 2, **overrides)


def cubes(fixed: int, slope: int, sides: tuple[int, ...] = (48, 64, 96)) -> list[Record]:
    return [sized((side,) * 3, fixed + slope * side**3) for side in sides]


def test_points_on_a_line_give_that_line() -> None:
    """Rounding alone is left: float64 has 16 digits, and the solver loses a few of them."""
    voxels = [48**3, 64**3, 512 * 512 * 320]
    line = fit_line(voxels, [700_000_000 + 3_131 * count for count in voxels])
    assert line.fixed_bytes == pytest.approx(700_000_000, rel=1e-9)
    assert line.bytes_per_voxel == pytest.approx(3_131, rel=1e-9)
    assert line.worst < 1e-9


def test_a_small_size_weighs_as_much_as_a_large_one() -> None:
    """Three sizes, the middle one 10 % above the line of the others: by least squares of the
    relative deviation no size is off by more than those 10 %; by those of plain bytes the smallest
    one, a ten-thousandth of the largest, would be off by far more."""
    line = fit_line([100, 10_000, 1_000_000], [100_000, 11_000_000, 1_000_000_000])
    assert 0.03 < line.worst < 0.10
    assert abs((line.fixed_bytes + 100 * line.bytes_per_voxel) / 100_000 - 1) < 0.10


def test_the_deviation_is_the_largest_of_all_sizes() -> None:
    """Through (1, 2) and (1, 4) at one size twice, and (2, 6): worked by hand, the relative least
    squares at x=1 are those of 2 and 4, minimal at y = (1/2 + 1/4) / (1/4 + 1/16) = 2.4."""
    line = fit_line([1, 1, 2], [2, 4, 6])
    assert line.fixed_bytes + line.bytes_per_voxel == pytest.approx(2.4)
    assert line.worst == pytest.approx(0.4)


def test_one_size_decides_no_line() -> None:
    with pytest.raises(ValueError, match="two sizes"):
        fit_line([5, 5], [1, 2])


def test_a_series_is_one_network_variant_mode_batch_precision_and_options() -> None:
    others: list[dict[str, Any]] = [
        {"network": "light_unet"},
        {"variant": "ccblock"},
        {"mode": "infer"},
        {"batch_size": 2},
        {"precision": "fp16"},
    ]
    records = [*cubes(0, 1000), *(sized((48, 48, 48), GIB, **other) for other in others)]
    series = make_series(records)
    assert [len(one.points) for one in series] == [3, 1, 1, 1, 1, 1]


def test_points_are_what_cases_need_by_rising_voxels_of_the_whole_batch() -> None:
    (series,) = make_series(
        [
            sized((64, 64, 64), 5 * GIB, batch_size=4),
            sized((48, 48, 48), 3 * GIB, batch_size=4, status="oom"),
        ]
    )
    assert [(p.shape, p.voxels, p.bytes) for p in series.points] == [
        ((48, 48, 48), 4 * 48**3, 3 * GIB),
        ((64, 64, 64), 4 * 64**3, 5 * GIB),
    ]
    assert series.points[0].bytes_per_voxel == 3 * GIB / (4 * 48**3)


def test_a_measured_case_says_what_it_used_and_an_unfinished_one_nothing() -> None:
    records = [
        make_record(needs_bytes=None, evidence="measured", tracer=None),
        make_record(requested_shape=(128, 128, 128), status="failed"),
    ]
    (series,) = make_series(records)
    assert [(p.shape, p.bytes) for p in series.points] == [((96, 96, 96), 3 * GIB + GIB // 2)]


def test_two_sizes_make_no_line_because_nothing_says_how_far_it_is_off() -> None:
    (series,) = make_series(cubes(0, 1000, (48, 64)))
    assert series.line is None
    assert largest_shape(series, 80 * GIB, (8, 8, 8)) is None


def test_the_largest_cube_is_a_multiple_of_what_the_network_pools() -> None:
    """2 GiB + 1024 bytes a voxel on 8 GiB: 6 x 2^20 voxels, the side is 184.6, so 184 or 176."""
    (series,) = make_series(cubes(2 * GIB, 1024))
    assert largest_shape(series, 8 * GIB, (8, 8, 8)) == (184, 184, 184)
    assert largest_shape(series, 8 * GIB, (16, 16, 16)) == (176, 176, 176)
    assert largest_shape(series, 8 * GIB, (16, 16, 1)) == (176, 176, 176)
    assert largest_shape(series, 2 * GIB, (8, 8, 8)) is None


def test_a_batch_shares_the_card() -> None:
    """Four samples: 6 x 2^20 voxels are 1.5 x 2^20 each, 116.3 a side."""
    records = [sized((s, s, s), 2 * GIB + 4096 * s**3, batch_size=4) for s in (48, 64, 96)]
    (series,) = make_series(records)
    assert largest_shape(series, 8 * GIB, (8, 8, 8)) == (112, 112, 112)


def test_sizes_of_one_plane_end_at_a_number_of_slices() -> None:
    """1 GiB + 1024 bytes a voxel of 512x512 slices, 256 MiB each: 28 of them on 8 GiB."""
    shapes = [(512, 512, slices) for slices in (4, 8, 16)]
    records = [sized(shape, GIB + 2**28 * shape[2]) for shape in shapes]
    (series,) = make_series(records)
    assert series.grows_by_slices
    assert largest_shape(series, 8 * GIB + 2**20, (16, 16, 1)) == (512, 512, 28)
    assert largest_shape(series, 8 * GIB + 2**20, (16, 16, 8)) == (512, 512, 24)
    assert largest_shape(series, GIB, (16, 16, 1)) is None


def test_a_line_that_does_not_rise_says_nothing_of_limits() -> None:
    assert Line(1.0, 0.0, 0.0).voxels(GIB) == 0
    assert Series(make_record(), ()).line is None


def test_a_line_that_hardly_rises_has_its_largest_side_at_once() -> None:
    """A byte in 10^15 voxels: 10^8 and more voxels a side, which nobody could count up to."""
    records = [
        make_record(requested_shape=(side,) * 3, needs_bytes=GIB + extra, shape=(side,) * 3)
        for extra, side in enumerate((100_000, 200_000, 300_000))
    ]
    (series,) = make_series(records)
    shape = largest_shape(series, 80 * GIB, (8, 8, 8))
    line = series.line
    assert shape is not None
    assert line is not None
    side = shape[0]
    assert side % 8 == 0
    assert side**3 <= line.voxels(80 * GIB) < (side + 8) ** 3
    assert side > 10**7
