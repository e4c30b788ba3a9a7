"""Bytes as people write them and read them: GiB and MiB, base 2.

Figures inside the project are plain ints of bytes; text appears only at its edges.
"""

from __future__ import annotations

import re
from decimal import Decimal

from bench.errors import MembenchError

__all__ = ["GIB", "KIB", "MIB", "format_bytes", "parse_bytes"]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_UNITS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
    "kb": 10**3,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*")
_HOW_TO = "write 24GiB, 512MiB or plain bytes"


def parse_bytes(text: str) -> int:
    """Return the bytes that ``text`` names: "24GiB", "24 GiB", "512MiB", "17179869184".

    GiB, MiB and KiB are base 2, GB is 10^9. A fraction, as torch prints it ("31.73GiB"), is rounded
    down to whole bytes; plain bytes have none.

    Errors: MembenchError for anything else. "MB" is refused: it means 10^6 to some and 2^20 to
    others.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise MembenchError(f"{text!r} is not a size in bytes: {_HOW_TO}")
    number, unit = match.groups()
    factor = _UNITS.get(unit.lower())
    if factor is None:
        why = f"the unit {unit!r} is not known"
        if unit.lower() == "mb":
            why = "MB means 10^6 bytes to some and 2^20 to others"
        raise MembenchError(f"{text!r} is not a size in bytes: {why}; {_HOW_TO}")
    size = Decimal(number) * factor
    if not unit and size != int(size):
        raise MembenchError(f"{text!r} is not a whole number of bytes: {_HOW_TO}")
    return int(size)


def format_bytes(size_bytes: int) -> str:
    """Return ``size_bytes`` for people, to the nearest: "26.4 GiB", "312 MiB", "1.5 KiB", "0 B".

    One decimal from GiB on, and below ten of any smaller unit; a trailing ".0" is left out of
    the smaller ones. A negative size keeps its sign.
    """
    sign = "-" if size_bytes < 0 else ""
    size = abs(size_bytes)
    if size < KIB:
        return f"{sign}{size} B"
    names = ("KiB", "MiB", "GiB", "TiB")
    place = min((size.bit_length() - 1) // 10, len(names)) - 1
    text = _rounded(size, place)
    if text == "1024" and place < len(names) - 1:  # 1023.9 MiB reads as 1.0 GiB, not 1024 MiB
        place += 1
        text = _rounded(size, place)
    return f"{sign}{text} {names[place]}"


def _rounded(size: int, place: int) -> str:
    value = size / (1 << 10 * (place + 1))
    if place >= 2:
        text = f"{value:.1f}"
        return "1024" if text == "1024.0" and place == 2 else text
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}".removesuffix(".0")
