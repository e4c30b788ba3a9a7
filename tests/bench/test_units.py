from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import MembenchError
from bench.units import GIB, KIB, MIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("24GiB", 25_769_803_776),
        ("24 GiB", 25_769_803_776),
        (" 24gib ", 25_769_803_776),
        ("512MiB", 536_870_912),
        ("1.5GiB", 1_610_612_736),
        ("3KiB", 3072),
        ("2TiB", 2_199_023_255_552),
        ("24GB", 24_000_000_000),
        ("1TB", 10**12),
        ("2kB", 2000),
        ("17179869184", 17_179_869_184),
        ("17179869184B", 17_179_869_184),
        ("0", 0),
    ],
)
def test_sizes_are_read_in_the_unit_they_name(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("24MB", r"MB means 10\^6 bytes to some"),
        ("24GiBs", "unit 'GiBs' is not known"),
        ("", "not a size"),
        ("GiB", "not a size"),
        ("-1GiB", "not a size"),
        ("1e9", "unit 'e' is not known|not a size"),
        ("1.5", "whole number of bytes"),
        ("nan", "not a size"),
        ("\u0661GiB", "not a size"),
        ("9" * 30, "not a size"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_says_what_to_write(text: str, why: str) -> None:
    with pytest.raises(MembenchError, match=why) as caught:
        parse_bytes(text)
    assert "write 24GiB, 512MiB or plain bytes" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (1536, "1.5 KiB"),
        (312 * MIB, "312 MiB"),
        (9 * MIB + MIB // 2, "9.5 MiB"),
        (9 * MIB + 999 * KIB, "10 MiB"),
        (MIB - 1, "1 MiB"),
        (1024 * MIB - 1, "1.0 GiB"),
        (GIB, "1.0 GiB"),
        (28_346_784_153, "26.4 GiB"),
        (1024 * GIB - 1, "1.0 TiB"),
        (5000 * GIB * 1024, "5000.0 TiB"),
        (-5 * MIB, "-5 MiB"),
    ],
)
def test_sizes_are_written_for_people(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@given(st.integers(0, 2**52))
def test_what_is_written_is_within_half_a_place_of_the_size(size_bytes: int) -> None:
    number, unit = format_bytes(size_bytes).split()
    factor = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 2**40}[unit]
    place = 0.1 if "." in number or float(number) < 9.95 else 1.0
    # Half a place, and a little for the division's own rounding.
    assert abs(float(number) - size_bytes / factor) <= place / 2 + 1e-9 * float(number)


def test_a_fraction_of_a_unit_is_rounded_down_to_whole_bytes() -> None:
    assert parse_bytes("0.3KiB") == 307  # of 307.2
    assert parse_bytes("31.73GiB") == 34_069_828_075  # of 34,069,828,075.52, torch's V100
