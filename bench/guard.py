"""A measured case among the other processes of its GPU: noted, or with ``--exclusive`` refused."""

from __future__ import annotations

from typing import Any

from bench.child import Child
from bench.neighbours import Occupants, Watch

__all__ = ["Guard"]

Readings = dict[str, Any]


class Guard:
    """Watches the GPU on which ``child`` measures a case, from now until ``judged``.

    A child that says nothing of a GPU, as one that predicts, is not watched.
    """

    def __init__(self, child: Child, exclusive: bool) -> None:
        occupants = child.hello.get("occupants")
        self._before = None if occupants is None else Occupants.from_dict(occupants)
        self._exclusive = exclusive
        self._watch: Watch | None = None
        if self._before is not None and self._before.known:
            self._watch = Watch(child.hello["gpu_uuid"], child.pid, self._before)

    def refusal(self) -> Readings | None:
        """Return what stands for a case's readings when it must not begin."""
        if not self._exclusive or self._before is None:
            return None
        if not self._before.known:
            return _refused("cannot tell who else is on the GPU: " + "; ".join(self._before.notes))
        others = self._before.describe()
        return _refused(f"on the GPU before the case: {others}") if others else None

    def judged(self, readings: Readings) -> Readings:
        """Return the readings with notes of who else was there; call it when the case has ended."""
        if self._before is None:
            return readings
        came = "" if self._watch is None else self._watch.end()
        if came and self._exclusive and readings["status"] in ("ok", "oom"):
            kept = {"phases": readings.get("phases", {}), "notes": readings.get("notes", ())}
            readings = _refused(f"came onto the GPU while the case ran: {came}") | kept
        notes = [*readings.get("notes", ()), *self._notes(came)]
        return {**readings, "notes": notes}

    def _notes(self, came: str) -> list[str]:
        assert self._before is not None
        if not self._before.known:
            return [f"other processes: not known: {'; '.join(self._before.notes)}"]
        notes = []
        if self._watch is not None and not self._watch.own_listed:
            why = "; ".join(self._before.notes) or "as in a container"
            notes.append(
                "other processes: NVML does not list ours, so others are told by their count and "
                f"by the device's memory in use before and after the case ({why})"
            )
        if self._before.describe():
            notes.append(f"other processes: on the GPU before the case: {self._before.describe()}")
        if came:
            notes.append(f"other processes: came while the case ran: {came}")
        return notes


def _refused(why: str) -> Readings:
    return {"status": "failed", "reason": f"--exclusive: {why}"}
