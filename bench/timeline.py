"""Memory over a case's steps, by category: the points that a picture needs, few and exact.

A record holds them as changes from one point to the next, which are short to write. What reads
them asks for sums: ``held_bytes``, ``requested_bytes``, ``allocated_bytes``, ``reserved_bytes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

__all__ = ["Timeline", "differences"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What was held at some of a run's events; the highest points are among them, exactly.

    ``events``: the numbers of the points' events, ascending. ``phases``: (name, the event at
    which it begins). ``changes_bytes``: for each category with any bytes, the requested bytes at
    the first point, then from each point to the next. ``rounding_changes_bytes`` and
    ``reserved_changes_bytes`` are the same for the allocator's rounding up and for what it had
    reserved; both are empty where the run ended for want of memory at ``oom_event``, and the
    categories then go on as on a card that is large enough.
    """

    events: tuple[int, ...]
    phases: tuple[tuple[str, int], ...]
    changes_bytes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rounding_changes_bytes: tuple[int, ...] = ()
    reserved_changes_bytes: tuple[int, ...] = ()
    oom_event: int | None = None

    def held_bytes(self) -> dict[str, tuple[int, ...]]:
        """Return category -> requested bytes at each point."""
        return {name: _sums(changes) for name, changes in self.changes_bytes.items()}

    def requested_bytes(self) -> tuple[int, ...]:
        """Return the requested bytes of all categories at each point."""
        columns = self.held_bytes().values()
        return tuple(map(sum, zip(*columns, strict=True))) or (0,) * len(self.events)

    def allocated_bytes(self) -> tuple[int, ...]:
        """Return the allocated bytes at each point; () where they are not known."""
        rounding = _sums(self.rounding_changes_bytes)
        if not rounding:
            return ()
        return tuple(a + b for a, b in zip(self.requested_bytes(), rounding, strict=True))

    def reserved_bytes(self) -> tuple[int, ...]:
        """Return the reserved bytes at each point; () where they are not known."""
        return _sums(self.reserved_changes_bytes)

    def peak(self) -> int:
        """Return the place in ``events`` at which the most requested bytes were held."""
        requested = self.requested_bytes()
        return max(range(len(requested)), key=requested.__getitem__)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Timeline:
        """Make a timeline from its JSON object.

        Errors: ValueError where its columns differ in length or hold anything but whole numbers.
        """
        columns = {name: tuple(column) for name, column in data["changes_bytes"].items()}
        rounding, reserved = (
            tuple(data.get(f"{name}_changes_bytes", ())) for name in ("rounding", "reserved")
        )
        events = tuple(data["events"])
        for column in (events, *columns.values(), rounding, reserved):
            if not set(map(type, column)) <= {int}:
                raise ValueError("timeline holds what is not a whole number")
        lengths = {len(column) for column in columns.values()} | {len(rounding), len(reserved)}
        if not events or not lengths <= {len(events), 0}:
            raise ValueError("timeline has columns that differ in length")
        return cls(
            events=events,
            phases=tuple((str(name), int(event)) for name, event in data["phases"]),
            changes_bytes=columns,
            rounding_changes_bytes=rounding,
            reserved_changes_bytes=reserved,
            oom_event=data.get("oom_event"),
        )


def differences(values: Sequence[int]) -> tuple[int, ...]:
    """Return the first value, then each one's difference from the one before."""
    return tuple(values[:1]) + tuple(b - a for a, b in pairwise(values))


def _sums(changes: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(changes))
