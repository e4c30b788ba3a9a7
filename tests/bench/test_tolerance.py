"""Tolerances: what can be written, and both sides of each limit, to the byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import MembenchError
from bench.tolerance import parse_tolerance

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "before", "allowed"),
    [
        ("1%", 1000, 10),
        ("1 %", 1000, 10),
        ("0.5%", 1000, 5),
        ("12.5 %", 8, 1),
        ("0", 1000, 0),
        ("0%", 1000, 0),
        ("0.0", 1000, 0),
        ("5MiB", 1000, 5 * MIB),
        ("0.5 GiB", 0, 512 * MIB),
        ("1024B", 7, 1024),
        ("2KiB", 7, 2048),
    ],
)
def test_a_tolerance_allows_this_many_bytes_and_not_one_more(
    text: str, before: int, allowed: int
) -> None:
    tolerance = parse_tolerance(text)
    assert tolerance.allowed(before) == allowed
    assert not tolerance.grew(before, before + allowed)
    assert tolerance.grew(before, before + allowed + 1)
    assert not tolerance.shrank(before, before - allowed)
    assert tolerance.shrank(before, before - allowed - 1)


@given(st.integers(1, 10**14))
def test_one_per_cent_is_exact_however_large_the_figure(hundredth: int) -> None:
    """As floats, 101 * hundredth / (100 * hundredth) - 1 is not always 0.01."""
    tolerance = parse_tolerance("1%")
    assert not tolerance.grew(100 * hundredth, 101 * hundredth)
    assert tolerance.grew(100 * hundredth, 101 * hundredth + 1)


def test_a_share_that_is_no_whole_byte_is_not_rounded_up() -> None:
    """1 % of 150 bytes is 1.5: one byte passes, two fail."""
    tolerance = parse_tolerance("1%")
    assert not tolerance.grew(150, 151)
    assert tolerance.grew(150, 152)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("5MB", "MB means 10^6 bytes to some and 2^20 to others"),
        ("5", "write 5% or 5MiB"),
        ("1.5", "write 1.5% or 1.5MiB"),
        ("-1%", "not a size"),
        ("-5MiB", "not a size"),
        ("", "not a size"),
        ("a%", "not a size"),
        ("1e3B", "not a size"),
        ("5MiB 1%", "not a size"),
        ("5 Mib/s", "not a size"),
    ],
)
def test_anything_else_is_refused_with_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(MembenchError, match=r"tolerance") as caught:
        parse_tolerance(text)
    assert hint in str(caught.value)
