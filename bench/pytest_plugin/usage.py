"""What a test asks for, and what it took: plain data that travels in pytest's own reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import pytest

from bench.errors import MembenchError, nearest
from bench.record import Evidence, Holder, Tracer
from bench.units import format_bytes, parse_bytes

__all__ = ["MARKER", "Counter", "Limit", "Reading", "Usage", "read_limit"]

MARKER = "limit_gpu_memory"
Counter = Literal["allocated", "reserved", "process"]
_FORM = f'write @pytest.mark.{MARKER}("2.3 GiB")'


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a marker says. ``card`` is the one to predict for; "" for the run's."""

    size_bytes: int | None = None  # None: not limited, only looked at
    counter: Counter = "allocated"
    card: str = ""


def read_limit(item: pytest.Item) -> Limit:
    """Return what the closest marker of a test says; no limit where it has none.

    Errors: MembenchError for a size, a counter or an argument that the marker does not take.
    """
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return Limit()
    given = dict(marker.kwargs)
    sizes = [*marker.args, *([given.pop("size")] if "size" in given else [])]
    counter, card = given.pop("counter", "allocated"), given.pop("card", None) or ""
    if len(sizes) != 1:
        raise MembenchError(f"{MARKER} takes one size, got {len(sizes)}: {_FORM}")
    if given:
        raise MembenchError(
            f"{MARKER} takes no {next(iter(given))!r}{nearest(next(iter(given)), _TAKEN)}"
        )
    if counter not in get_args(Counter):
        raise MembenchError(
            f"{MARKER}: no counter {counter!r}{nearest(str(counter), get_args(Counter))}"
        )
    return Limit(size_bytes=_size(sizes[0]), counter=counter, card=str(card))


_TAKEN = ("size", "counter", "card")


def _size(given: Any) -> int:
    if type(given) is int and given >= 0:
        return given
    if not isinstance(given, str):
        raise MembenchError(f"{MARKER}: {given!r} is no size: {_FORM}, or whole bytes")
    try:
        return parse_bytes(given)
    except MembenchError as error:
        raise MembenchError(f"{MARKER}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The highest counters of the caching allocator over a time, in bytes.

    ``before_allocated_bytes``: allocated as it began. ``process_bytes``: reserved and what the
    process holds outside the allocator; None where nobody can say. ``out_of_memory``: what did not
    fit, "" if all did; the counters are then those until then.
    """

    before_allocated_bytes: int = 0
    peak_requested_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_active_bytes: int = 0
    peak_reserved_bytes: int = 0
    process_bytes: int | None = None
    holders: tuple[Holder, ...] = ()
    out_of_memory: str = ""

    def counter(self, name: Counter) -> int | None:
        """Return the counter that a limit names."""
        if name == "process":
            return self.process_bytes
        return self.peak_reserved_bytes if name == "reserved" else self.peak_allocated_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one test took, with all that shaped the figures.

    ``compared``: what the baseline says of it, "" without one, else a verdict of
    ``membench check``. ``ended``: whether the test's own code came to its end.
    """

    nodeid: str
    evidence: Evidence
    card: str
    reading: Reading
    limit: Limit = Limit()
    tracer: Tracer | None = None
    card_hash: str = ""
    torch: str = ""
    cudnn: str = ""
    allocator_settings: str = ""
    ended: bool = True
    compared: str = ""
    growth_bytes: int | None = None

    @property
    def said(self) -> str:
        """``predicted for v100-32gb`` or ``measured on h200-141gb``."""
        preposition = "for" if self.evidence == "predicted" else "on"
        traced = ", from the CPU's operators" if self.tracer == "cpu" else ""
        return f"{self.evidence} {preposition} {self.card}{traced}"

    @property
    def over_limit(self) -> str:
        """Say how the limit is exceeded, "" if it is not."""
        limit, took = self.limit, self.reading.counter(self.limit.counter)
        if limit.size_bytes is None:
            return ""
        if took is None:
            return f"the limit is on {limit.counter} bytes, which could not be {self.evidence} here"
        if took <= limit.size_bytes:
            return ""
        sizes = [format_bytes(took), format_bytes(limit.size_bytes)]
        if sizes[0] == sizes[1]:  # they differ, so a reader must see by what
            sizes = [f"{took:,} bytes", f"{limit.size_bytes:,}"]
        return f"peak {limit.counter} {sizes[0]} is over the limit of {sizes[1]} ({self.said})"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Usage:
        """Make it from what ``to_dict`` gave."""
        reading = dict(data["reading"])
        reading["holders"] = tuple(Holder(**holder) for holder in reading["holders"])
        return cls(**{**data, "reading": Reading(**reading), "limit": Limit(**data["limit"])})
