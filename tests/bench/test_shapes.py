"""Shapes: read, cropped, padded, refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import SuiteError
from bench.shapes import (
    MAX_SIDE,
    check_poolable,
    crop,
    format_shape,
    pad_to,
    parse_inplane,
    parse_shape,
)

side = st.integers(1, 2000)


@given(st.lists(side, min_size=2, max_size=3).map(tuple))
def test_a_written_shape_is_read_back(shape: tuple[int, ...]) -> None:
    assert parse_shape(format_shape(shape)) == shape


def test_sides_are_read_in_the_order_x_y_slices() -> None:
    assert parse_shape("256x200x45") == (256, 200, 45)
    assert parse_shape("256x200") == (256, 200)
    assert parse_inplane("256x200") == (256, 200)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x96x96", "side 0 of '0x96x96' is not positive"),
        ("96x00x96", "side 00 of '96x00x96' is not positive"),
        ("96x-8x96", "side -8 of '96x-8x96' is not positive"),
        ("96xabx96", "side 'ab' of '96xabx96' is not a whole number; write 256x256 or 256x256x256"),
        ("9.5x8x8", "side '9.5' of '9.5x8x8' is not a whole number; write 256x256 or 256x256x256"),
        ("٣x8x8", "side '٣' of '٣x8x8' is not a whole number; write 256x256 or 256x256x256"),
        ("8x8x", "side '' of '8x8x' is not a whole number; write 256x256 or 256x256x256"),
        ("96", "'96' has 1 side(s), not 2 or 3; write 256x256 or 256x256x256"),
        ("8x8x8x8", "'8x8x8x8' has 4 side(s), not 2 or 3; write 256x256 or 256x256x256"),
        ("8x8x65537", "side 65537 of '8x8x65537' is over the limit of 65536"),
        (
            "8x8x" + "9" * 5000,
            "side 999999999999 of '8x8x" + "9" * 36 + "' is over the limit of 65536",
        ),
        (
            "4096x4096x4097",
            "'4096x4096x4097' has 68736253952 voxels, over the limit of 68719476736",
        ),
    ],
)
def test_a_bad_shape_says_which_side_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SuiteError) as error:
        parse_shape(text)
    assert str(error.value) == message


def test_the_longest_side_and_the_most_voxels_are_allowed() -> None:
    assert parse_shape(f"{MAX_SIDE}x8x8") == (65_536, 8, 8)
    assert parse_shape("4096x4096x4096") == (4096, 4096, 4096)


def test_inplane_sides_are_two() -> None:
    with pytest.raises(SuiteError) as error:
        parse_inplane("256x256x256")
    assert str(error.value) == "'256x256x256' has 3 side(s), not 2; write 256x256"


def test_crop_limits_x_and_y_alone_and_never_enlarges() -> None:
    assert crop((300, 200, 500), (256, 256)) == (256, 200, 500)
    assert crop((300, 280), (256, 270)) == (256, 270)


def test_the_papers_slices_are_padded_up() -> None:
    """45 to 234 slices at a divisor of 8: 48 and 240, and what divides stays."""
    assert pad_to((256, 256, 45), (8, 8, 8)) == (256, 256, 48)
    assert pad_to((256, 256, 234), (8, 8, 8)) == (256, 256, 240)
    assert pad_to((256, 256, 5), (16, 16, 1)) == (256, 256, 5)


@given(st.tuples(side, side, side), st.tuples(*[st.integers(1, 64)] * 3))
def test_padding_gives_the_nearest_poolable_shape_above(
    shape: tuple[int, int, int], divisor: tuple[int, int, int]
) -> None:
    padded = pad_to(shape, divisor)
    check_poolable(padded, divisor, "net")
    assert all(0 <= p - s < d for p, s, d in zip(padded, shape, divisor, strict=True))


def test_sides_that_cannot_be_pooled_are_told_with_their_neighbours() -> None:
    with pytest.raises(SuiteError) as error:
        check_poolable((100, 96, 5), (8, 8, 8), "fcn")
    assert str(error.value) == (
        "100x96x5 cannot be pooled by fcn, whose sides are multiples of 8: x 100 (use 96 or 104), "
        "slices 5 (use 8); or give the shape pad: true"
    )


def test_divisors_that_differ_by_axis_are_all_told() -> None:
    with pytest.raises(SuiteError) as error:
        check_poolable((256, 250, 5), (16, 16, 1), "pocket")
    assert str(error.value) == (
        "256x250x5 cannot be pooled by pocket, whose sides are multiples of 16x16x1: "
        "y 250 (use 240 or 256); or give the shape pad: true"
    )
